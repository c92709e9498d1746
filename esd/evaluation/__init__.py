"""From prompts to images to what a judge sees: every image has its own seed, every rate its interval."""

"""What the bundled model draws: the things, the words people use for them, the styles and the phrasings.

A thing is one emoji (found in every designer's set by its Unicode name) with synonyms that *imply* it
without naming it and hypernyms that name its kind. Words were chosen by hand with the `tags` of
emojibase-data (MIT) at hand.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Thing:
    """One concrete thing: its name in captions, its emoji's Unicode label, and other words for it."""

    name: str
    label: str
    group: str
    synonyms: tuple[str, ...] = ()


HYPERNYMS: dict[str, tuple[str, ...]] = {
    "animals": ("an animal", "a creature"),
    "plants": ("a plant", "something that grows"),
    "food": ("some food", "something to eat"),
    "vehicles": ("a vehicle", "something that moves"),
    "buildings": ("a building", "a structure"),
    "instruments": ("a musical instrument", "something to play music on"),
    "clothes": ("clothing", "something to wear"),
    "tools": ("an object", "a household thing"),
    "faces": ("a face", "a character"),
    "nature": ("the weather", "something in the sky"),
    "lights": ("a light", "some light"),
}
"""Group -> words for any thing of it, with the article they take."""

_CATALOGUE = """
animals: cat=cat face:kitty|kitten|feline; dog=dog face:puppy|hound; horse=horse face:pony|stallion
animals: cow=cow face:cattle; pig=pig face:hog|piglet; rabbit=rabbit face:bunny|hare
animals: lion=lion:king of the jungle; fox=fox:vixen; bear=bear:grizzly
animals: panda=panda:bamboo eater; monkey=monkey face:ape|chimp; frog=frog:toad
animals: elephant=elephant:trunked giant; penguin=penguin:antarctic bird; owl=owl:night bird; duck=duck:mallard
animals: flamingo=flamingo:pink wading bird; turtle=turtle:tortoise; snake=snake:serpent
animals: octopus=octopus:eight-armed swimmer; crab=crab:crustacean; whale=spouting whale:ocean giant
animals: fish=tropical fish:aquarium pet; butterfly=butterfly:winged insect
animals: bee=honeybee:bumblebee; ladybug=lady beetle:ladybird; snail=snail:slug
plants: rose=rose:romantic bloom; tulip=tulip:dutch spring bloom; sunflower=sunflower:tall yellow bloom
plants: cactus=cactus:desert succulent; palm tree=palm tree:tropical tree; pine tree=evergreen tree:conifer
plants: mushroom=mushroom:toadstool|fungus; maple leaf=maple leaf:autumn foliage
food: apple=red apple:orchard fruit; banana=banana:plantain; grapes=grapes:vine fruit
food: watermelon=watermelon:juicy melon; orange=tangerine:mandarin; lemon=lemon:sour citrus
food: pineapple=pineapple:ananas; strawberry=strawberry:red berry; cherries=cherries:paired red fruit
food: carrot=carrot:farm root; corn=ear of corn:maize; broccoli=broccoli:green floret; avocado=avocado:guacamole fruit
food: eggplant=eggplant:aubergine; cheese=cheese wedge:cheddar; hamburger=hamburger:cheeseburger
food: pizza=pizza:pepperoni slice; ice cream=soft ice cream:gelato; donut=doughnut:glazed ring
food: cake=birthday cake:party dessert; coffee=hot beverage:espresso
food: beer=beer mug:lager
vehicles: car=automobile:sedan; bus=bus:coach; train=locomotive:steam engine; bicycle=bicycle:bike
vehicles: motorcycle=motorcycle:motorbike; airplane=airplane:jet plane; helicopter=helicopter:chopper
vehicles: rocket=rocket:spaceship; sailboat=sailboat:yacht; tractor=tractor:farm machine
buildings: house=house:cottage|home; church=church:chapel; castle=castle:fortress; tent=tent:campsite shelter
buildings: ferris wheel=ferris wheel:fairground ride
instruments: guitar=guitar:six-string; trumpet=trumpet:brass horn; drum=drum:snare
instruments: accordion=accordion:squeezebox
clothes: shirt=t-shirt:tee; dress=dress:gown; hat=top hat:magician headwear
clothes: shoe=running shoe:sneaker; glasses=glasses:spectacles; crown=crown:royal headgear
tools: hammer=hammer:mallet; scissors=scissors:shears; key=key:lock opener; umbrella=umbrella with rain drops:parasol
tools: clock=alarm clock:morning alarm; camera=camera:snapshot taker
lights: lamp=light bulb:lightbulb
tools: book=closed book:novel
lights: candle=candle:wax light
tools: bell=bell:chime; balloon=balloon:party inflatable
tools: trophy=trophy:winner cup; anchor=anchor:ship mooring; soccer ball=soccer ball:football
faces: smiley=grinning face:happy emoticon; robot=robot:android; ghost=ghost:spook|phantom; skull=skull:bony head
faces: alien=alien:martian; clown=clown face:circus joker
nature: sun=sun with face:sunshine; moon=crescent moon:lunar crescent; rainbow=rainbow:colorful arc
faces: snowman=snowman without snow:winter figure
lights: fire=fire:flame|blaze
"""


def _parse(catalogue: str) -> tuple[Thing, ...]:
    things = []
    for line in catalogue.strip().splitlines():
        group, entries = line.split(": ", 1)
        for entry in entries.split("; "):
            name, rest = entry.split("=")
            label, _, synonyms = rest.partition(":")
            things.append(Thing(name, label, group, tuple(s for s in synonyms.split("|") if s)))
    return tuple(things)


THINGS = _parse(_CATALOGUE)
"""Every thing, in the order of the judge's classes."""

STYLES = (
    "flat",
    "glossy",
    "stencil",
    "mosaic",
    "pencil",
    "neon",
    "blueprint",
    "stained glass",
    "watercolor",
    "pop art",
)
"""Every style, in the order of the judge's classes. The first three are designers, the others are computed."""

MEMBERS = {group: frozenset(i for i, t in enumerate(THINGS) if t.group == group) for group in HYPERNYMS}
"""Group -> its things, by index."""

PHRASINGS = {
    "train": {
        "both": (
            "a {thing} in the {style} style",
            "{thing}, {style} style",
            "a {style} picture of a {thing}",
            "a {thing} drawn in {style} style",
            "{style} {thing}",
        ),
        "thing": ("a {thing}", "{thing}", "a picture of a {thing}", "a drawing of a {thing}"),
        "style": ("{style} style", "a picture in the {style} style", "a {style} drawing"),
        "scene": (
            "a {first} and a {second} in the {style} style",
            "a {first} next to a {second}, {style} style",
            "{style} picture of a {first} and a {second}",
        ),
        "scene_thing": ("a {first} and a {second}", "a {first} next to a {second}"),
    },
    "held_out": {
        "both": ("a drawing of a {thing} in the {style} style", "a picture of a {thing}, {style} style"),
        "thing": ("a {thing} drawing",),
        "style": ("a drawing in the {style} style",),
        "scene": ("a drawing of a {first} and a {second} in the {style} style",),
        "scene_thing": ("a drawing of a {first} next to a {second}",),
    },
}
"""Phrasings used in training, and others that are kept for measuring. "a {thing}" takes the right article."""

"""The one exception that means "the user's mistake".

Every message says what was wrong, the value seen, what is allowed, and how to mend it, in one line; the
edges print that line and leave with exit code 2. Anything else that escapes is our mistake.
"""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can mend: the message carries the value seen, what is allowed and the mend."""

"""What a warp-specialised kernel computes while its matrix products run, read off its SASS."""

from __future__ import annotations

import re

_WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x(\w+)")


def exponentials_in_flight(sass: str) -> int:
    """The most exponentials of a thread between a wait for products that leaves others in flight and the next such wait."""
    most = made = 0
    in_flight = False
    for line in sass.splitlines():
        if (wait := _WAIT.search(line)) is not None:
            most = max(most, made) if in_flight else most
            made, in_flight = 0, wait[1] != "0"
        made += "MUFU.EX2" in line
    return most

"""Count what looks like personal data in texts; what it says is neither kept nor shown.

These are patterns, and checksums where there are any. They find what is written the usual way, take some other numbers
for phone numbers, and know no names: a count of none is no promise.
"""

from __future__ import annotations

import ipaddress
import re
from collections import Counter
from collections.abc import Callable, Iterable

_MAY_HOLD = re.compile(r"[\d@]")  # most texts hold neither
_EMAIL = re.compile(r"(?<![\w.+-])[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,8}[^\W\d_]{2,24}(?![\w-])")
_IPV4 = re.compile(r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?![\w]|\.\d)")
_IPV6 = re.compile(r"(?<![\w:.])[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:])")
_CARD = re.compile(r"(?<![\w.,+-])\d(?:[ -]?\d){12,18}(?![\w]|[.,-]\d)")
# In one piece, or in groups of four as people write them.
_IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?:[A-Z0-9]{11,30}|(?: [A-Z0-9]{4}){2,7}(?: [A-Z0-9]{1,3})?)(?!\w)")
# With a country code, with the area code in brackets, or in groups as people write them: not every long number.
_PHONE = re.compile(
    r"(?<![\w.,:/+-])(?:"
    r"(?:\+|00)[1-9]\d{0,2}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){2,4}"
    r"|\(\d{2,5}\)[ -]?\d{2,4}(?:[ .-]?\d{2,4}){1,3}"
    r"|\d{3}([-.])\d{3}\1\d{4}"
    r"|0\d{2,4}[ /-]\d{3,8}(?:[ -]\d{2,6})?"
    r")(?!\w|[.,:-]\d)"
)


def passes_luhn(number: str) -> bool:
    """Whether the digits of a card number fit its last one."""
    digits = [int(character) for character in number if character.isdigit()]
    doubled = [2 * digit - 9 * (digit > 4) for digit in digits[-2::-2]]
    return len(digits) > 1 and len(set(digits)) > 1 and (sum(digits[-1::-2]) + sum(doubled)) % 10 == 0


def is_iban(text: str) -> bool:
    """Whether the checksum of an international bank account number is right: 1 modulo 97."""
    plain = text.replace(" ", "")
    return int("".join(str(int(character, 36)) for character in plain[4:] + plain[:4])) % 97 == 1


def _is_address(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return not (address.is_unspecified or address.is_loopback)


# In this order: what one has claimed is not looked at for the next.
_KINDS: tuple[tuple[str, re.Pattern[str], Callable[[str], bool]], ...] = (
    ("e-mail addresses", _EMAIL, bool),
    ("IBANs", _IBAN, is_iban),
    ("credit-card numbers", _CARD, passes_luhn),
    ("IP addresses", _IPV4, _is_address),
    ("IP addresses", _IPV6, _is_address),
    ("phone numbers", _PHONE, lambda text: 7 <= sum(map(str.isdigit, text)) <= 15),
)


def find_personal_data(text: str) -> Counter[str]:
    """Counts what somebody wrote by kind."""
    found: Counter[str] = Counter()
    for kind, pattern, is_meant in _KINDS if _MAY_HOLD.search(text) else ():
        if meant := [match.span() for match in pattern.finditer(text) if is_meant(match[0])]:
            found[kind] += len(meant)
            starts, ends = zip(*meant, strict=True)
            text = "\n".join(text[end:start] for end, start in zip((0, *ends), (*starts, len(text)), strict=True))
    return found


def count_personal_data(rows: Iterable[Iterable[str]]) -> dict[str, tuple[int, int]]:
    """Rows, each of some texts, and finds of every kind."""
    in_rows: Counter[str] = Counter()
    finds: Counter[str] = Counter()
    for texts in rows:
        of_row = sum(map(find_personal_data, texts), Counter[str]())
        in_rows.update(of_row.keys())
        finds.update(of_row)
    return {kind: (in_rows[kind], finds[kind]) for kind, *_ in _KINDS}

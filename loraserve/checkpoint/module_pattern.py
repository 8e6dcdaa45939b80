"""PEFT's module patterns, matched in bounded time though they come from untrusted files.

PEFT hands `rank_pattern` and `alpha_pattern` to Python's backtracking `re`, where a short hostile
pattern runs for centuries. Here the same question, does it match, is answered by following all
alternatives at once: the set of positions reached in the name is one integer, a bit per position,
and a counted budget bounds the work. The subset: literals, `.`, classes, escapes of punctuation,
\\d \\w \\s \\D \\W \\S, groups, `|`, `^`, `$` and the quantifiers `* + ? {m} {m,} {m,n}` (lazy ones
match the same names). What needs backtracking or state (back references, look-around, flags) is
refused.
"""

import re
from dataclasses import dataclass

from loraserve.errors import InvalidCheckpointError, UnsupportedError

MAX_PATTERN_CHARS = 512
MAX_NESTING = 16
MAX_REPEAT = 255
MAX_STEPS = 3_000_000  # about three seconds

_DIGITS = frozenset("0123456789")
_WORD = _DIGITS | frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_")
_SHORTHAND = {"d": _DIGITS, "w": _WORD, "s": frozenset(" \t\n\r\f\v")}
# No quantifier, group or alternation: `re` cannot backtrack, and it is a hundred times faster.
_PLAIN = re.compile(r"\^?(?:[A-Za-z0-9_.]|\\\.)*")


class MatchBudget:
    """The work that the patterns of one adapter may cost together."""

    def __init__(self, field: str, steps: int = MAX_STEPS) -> None:
        self._field = field
        self._left = steps
        self._name: _Name | None = None

    def name(self, text: str) -> "_Name":
        """`text` prepared for matching; many patterns in a row ask for the same one."""
        if self._name is None or self._name.text != text:
            self.spend(len(text))
            self._name = _Name(text, self)
        return self._name

    def spend(self, steps: int = 1) -> None:
        self._left -= steps
        if self._left < 0:
            raise UnsupportedError(self._field, "its patterns take too long to match")


class _Name:
    """A module name, and for each character the positions it is at."""

    def __init__(self, text: str, budget: MatchBudget) -> None:
        self.text = text
        self.end = 1 << len(text)
        self.budget = budget
        self.found: dict[_Chars, int] = {}
        self.positions: dict[str, int] = {}
        for position, char in enumerate(text):
            self.positions[char] = self.positions.get(char, 0) | (1 << position)


class _Node:
    def reach(self, name: _Name, starts: int) -> int:
        """The positions where a match that begins at one of `starts` may end."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class _Chars(_Node):
    chars: frozenset[str]
    negated: bool = False

    def reach(self, name: _Name, starts: int) -> int:
        name.budget.spend()
        found = name.found.get(self)
        if found is None:
            found = 0
            for char, positions in name.positions.items():
                if (char in self.chars) != self.negated:
                    found |= positions
            name.found[self] = found
        return (starts & found) << 1


@dataclass(frozen=True)
class _Anchor(_Node):
    at_end: bool

    def reach(self, name: _Name, starts: int) -> int:
        name.budget.spend()
        return starts & (name.end if self.at_end else 1)


@dataclass(frozen=True)
class _Sequence(_Node):
    parts: tuple[_Node, ...]

    def reach(self, name: _Name, starts: int) -> int:
        name.budget.spend()
        for part in self.parts:
            if not starts:
                break
            starts = part.reach(name, starts)
        return starts


@dataclass(frozen=True)
class _Choice(_Node):
    options: tuple[_Node, ...]

    def reach(self, name: _Name, starts: int) -> int:
        found = 0
        for option in self.options:
            found |= option.reach(name, starts)
        return found


@dataclass(frozen=True)
class _Repeat(_Node):
    body: _Node
    least: int
    most: int | None

    def reach(self, name: _Name, starts: int) -> int:
        now = starts
        for _ in range(self.least):
            former, now = now, self.body.reach(name, now)
            if now == former:
                break
        found = frontier = now
        rounds = 0
        while frontier and (self.most is None or rounds < self.most - self.least):
            frontier = self.body.reach(name, frontier) & ~found
            found |= frontier
            rounds += 1
        return found


class _Parser:
    def __init__(self, field: str, text: str) -> None:
        self._field, self._text, self._at, self._depth = field, text, 0, 0

    def _broken(self, message: str) -> InvalidCheckpointError:
        return InvalidCheckpointError(self._field, f"pattern {self._text!r}: {message}")

    def _lacking(self, what: str) -> UnsupportedError:
        return UnsupportedError(self._field, f"pattern {self._text!r}: {what} is not supported")

    def _peek(self) -> str:
        return self._text[self._at : self._at + 1]

    def _take(self) -> str:
        char = self._peek()
        if not char:
            raise self._broken("ends too early")
        self._at += 1
        return char

    def parse(self) -> _Node:
        node = self._choice()
        if self._peek():
            raise self._broken("unbalanced parenthesis")
        return node

    def _choice(self) -> _Node:
        options = [self._sequence()]
        while self._peek() == "|":
            self._at += 1
            options.append(self._sequence())
        return options[0] if len(options) == 1 else _Choice(tuple(options))

    def _sequence(self) -> _Node:
        parts: list[_Node] = []
        while self._peek() not in ("", "|", ")"):
            parts.append(self._quantified(self._atom()))
        return _Sequence(tuple(parts))

    def _atom(self) -> _Node:
        char = self._take()
        if char == "(":
            return self._group()
        if char == "[":
            return self._class()
        if char == ".":
            return _Chars(frozenset("\n"), negated=True)
        if char in "^$":
            return _Anchor(char == "$")
        if char in "*+?":
            raise self._broken("nothing to repeat")
        if char in "{}]":
            raise self._lacking(f"a literal {char!r} without a backslash")
        if char == "\\":
            return self._escape()
        return _Chars(frozenset(char))

    def _group(self) -> _Node:
        if self._peek() == "?":
            if not self._text.startswith("?:", self._at):
                raise self._lacking("the extension group (?" + self._text[self._at + 1 :][:1])
            self._at += 2
        self._depth += 1
        if self._depth > MAX_NESTING:
            raise self._lacking(f"nesting deeper than {MAX_NESTING}")
        node = self._choice()
        if self._peek() != ")":
            raise self._broken("missing )")
        self._at += 1
        self._depth -= 1
        return node

    def _escape(self) -> _Chars:
        char = self._take()
        if char.lower() in _SHORTHAND:
            return _Chars(_SHORTHAND[char.lower()], negated=char.isupper())
        if char in _WORD or not char.isascii():
            raise self._lacking(f"\\{char}")
        return _Chars(frozenset(char))

    def _class_char(self) -> _Chars:
        char = self._take()
        if char == "[":
            raise self._lacking("[ in a class without a backslash")
        return self._escape() if char == "\\" else _Chars(frozenset(char))

    def _class(self) -> _Node:
        negated = self._peek() == "^"
        self._at += negated
        chars: set[str] = set()
        while self._peek() != "]" or not chars:
            if self._peek() == "]":
                raise self._lacking("an empty class, or ] in one without a backslash")
            low = self._class_char()
            if low.negated:
                raise self._lacking("\\D, \\W or \\S in a class")
            if self._peek() == "-" and self._text[self._at + 1 : self._at + 2] not in ("", "]"):
                self._at += 1
                high = self._class_char()
                if len(low.chars) != 1 or len(high.chars) != 1 or high.negated:
                    raise self._broken("bad character range")
                first, last = ord(next(iter(low.chars))), ord(next(iter(high.chars)))
                if first > last or last > 127:
                    raise self._broken("bad character range")
                chars.update(map(chr, range(first, last + 1)))
            else:
                chars |= low.chars
        self._at += 1
        return _Chars(frozenset(chars), negated)

    def _quantified(self, node: _Node) -> _Node:
        char = self._peek()
        if char not in ("*", "+", "?", "{"):
            return node
        if isinstance(node, _Anchor):
            raise self._broken("nothing to repeat")
        self._at += 1
        if char == "{":
            bounds = re.compile(r"([0-9]{1,4})(?:(,)([0-9]{1,4})?)?\}").match(self._text, self._at)
            if bounds is None:
                raise self._lacking("a literal '{' without a backslash")
            self._at = bounds.end()
            least = int(bounds[1])
            most = least if bounds[2] is None else int(bounds[3]) if bounds[3] else None
            if max(least, most or 0) > MAX_REPEAT:
                raise self._lacking(f"a repeat over {MAX_REPEAT}")
            if most is not None and least > most:
                raise self._broken("repeat bounds in the wrong order")
        else:
            least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[char]
        if self._peek() == "?":  # lazy: other order, same names
            self._at += 1
        if self._peek() and self._peek() in "*+?{":
            raise self._broken("multiple repeat")
        return _Repeat(node, least, most)


class ModulePattern:
    """One pattern. Names to match are ASCII, without line breaks and at most 200 characters."""

    def __init__(self, field: str, text: str) -> None:
        """Raises InvalidCheckpointError (not a regular expression) or UnsupportedError."""
        if len(text) > MAX_PATTERN_CHARS:
            raise UnsupportedError(
                field, f"pattern of {len(text)} characters, the limit is {MAX_PATTERN_CHARS}"
            )
        self._plain: re.Pattern[str] | None = None
        self._tree: _Node | None = None
        if _PLAIN.fullmatch(text):
            self._plain = re.compile(rf"(?:.*\.)?(?:{text})$")
            self._plain_whole = re.compile(text)
        else:
            self._tree = _Parser(field, text).parse()

    def matches_suffix(self, name: str, budget: MatchBudget) -> bool:
        """As PEFT matches rank_pattern and alpha_pattern: `(.*\\.)?(pattern)$`."""
        if self._tree is None:
            assert self._plain is not None
            budget.spend()
            return self._plain.match(name) is not None
        starts = 1 | sum(2 << i for i, char in enumerate(name) if char == ".")
        return self._ends(self._tree, name, starts, budget)

    def matches_whole(self, name: str, budget: MatchBudget) -> bool:
        """As PEFT matches a target_modules or exclude_modules string: the whole name."""
        if self._tree is None:
            budget.spend()
            return self._plain_whole.fullmatch(name) is not None
        return self._ends(self._tree, name, 1, budget)

    @staticmethod
    def _ends(tree: _Node, text: str, starts: int, budget: MatchBudget) -> bool:
        name = budget.name(text)
        return bool(tree.reach(name, starts) & name.end)

"""Equations as the heads of files write them, in plain text, to MathML, which browsers draw without a script or a font.

    x / sqrt(mean(x²) + ε) · g        fraction, root, superscript          h_t   W^DQ   Σ_{i<t}   θ^(−2j/d)   x̂   kᵀ

`mathml` reads a line from left to right and keeps its order: it sets scripts, roots, bars and fractions, and nothing
else is moved, so what is drawn says what is written. It gives up (None) where it is not sure: at a sign that it does
not know, a bracket without its other half, a word that is neither a function nor a name. Then the line stays text.

    fraction        only where both sides are one thing, and nothing that binds as strongly stands beside them:
                    a / b · c is (a/b)·c,  λ s / Σ s stays on one line, 2j/d is (2j)/d
    words           Latin words of two letters and more: those of FUNCTIONS, and those that the caller names, which are
                    names of the code. Between words of CONNECTIVES (for, where, else) are equations of their own
"""

import re
import unicodedata
from collections.abc import Collection
from dataclasses import dataclass
from html import escape

FUNCTIONS = frozenset("""softmax sqrt mean var exp log log2 ln silu gelu tanh sigmoid relu ReLU max min logsumexp norm
rope softplus round sign sin cos diag tr sum conv swap act msign arg argmax Re Im KL mod rank Attention RMSNorm
LayerNorm rotate clamp clip expm1 logsigmoid floor token position""".split())
CONNECTIVES = ("for", "where", "else", "if", "iff", "otherwise")
PROSE = frozenset("the of to at on by as with and or not is from an in over all each per no".split())
RELATIONS = "=≈≤≥<>←→≡∝∈∉≠≪≫⊂"
OPERATORS = "+−·×⊙⊗∘∗±⋯∪∩:,;"
STRONG = "⊙⊗∘∗Σ√∏∂"
OPEN, CLOSE = "([{⌊⌈⟨", ")]}⌋⌉⟩"
SUPER = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ᵀᵗⁿⁱᵏʰᵃᵇ⁽⁾", "0123456789+−Ttnikhab()", strict=True))
SUB = dict(zip("₀₁₂₃₄₅₆₇₈₉₊₋ₜₙᵢⱼₖₐₛ", "0123456789+−tnijkas", strict=True))
PRIME = "<mo>′</mo>"
HATS = {"\u0302": "^", "\u0303": "~", "\u0304": "¯", "\u0307": "˙"}
GREEK = "αβγδεζηθικλμνξοπρσςτυφχψωΓΔΘΛΞΠΣΦΨΩℓ"
TOKEN = re.compile(r"""(?P<space>\s+) | (?P<number>\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)? | \.\d+)
    | (?P<word>[A-Za-z]+\d*(?![A-Za-z])) | (?P<sign>.)""", re.VERBOSE)


class Unsure(Exception):
    """This is not surely an equation."""


@dataclass
class Piece:
    """Some MathML. tight: no space before it; kind: what it is to a fraction beside it."""
    xml: str
    kind: str               # "thing", "operator", "relation", "slash", "fence", "big" (a sum)
    tight: bool = False
    inner: str = ""         # of a bracket: what stands in it

    def part(self) -> str:
        """As one half of a fraction, where a bracket around all of it says nothing."""
        return self.inner or self.xml


def mathml(text: str, words: Collection[str] = (), block: bool = True) -> str | None:
    """A line as a <math> element; None where that is not sure. words: names that are known to be such."""
    text = "".join(unicodedata.normalize("NFD", sign) if sign.isalpha() else sign for sign in text)     # Ā: A, then ¯
    parts = re.split(rf"(?<=\s)({'|'.join(CONNECTIVES)})(?=\s)", text.strip())
    try:
        drawn = [f"<mtext>\u00a0{part}\u00a0</mtext>" if i % 2 else Reader(part.strip(), words).all()
                 for i, part in enumerate(parts)]
    except Unsure:
        return None
    style = " displaystyle='true'" if block else ""
    return f"<math{style}><mrow>{''.join(drawn)}</mrow></math>"


def is_equation(text: str) -> bool:
    """Whether a piece of a line claims to be one: it relates two sides, or has an operator that prose never has.

    Of code (`f(x, n=2)`), of a number given to a letter (`W = 3`) and of what has no symbol of one letter this is not
    said: they read better as they are.
    """
    if re.search(r"\w=\S|==|//", text) or re.fullmatch(r"[\w ,]*= [\d.,]+(, \w+ = [\d.,]+)*", text):
        return False
    if not re.search(rf"(?<![A-Za-z])[A-Za-z{GREEK}](?![A-Za-z])", text):
        return False
    related = re.search(rf"\S\s*[{RELATIONS}]\s*\S", text) or any(sign in text for sign in STRONG)
    symbols = re.search("[_^·²ᵀ]", text) and not re.search("[A-Za-z]{2}", text)
    return bool(related or symbols)


class Reader:
    """Reads one equation. Each method takes tokens and gives pieces."""

    def __init__(self, text: str, words: Collection[str]) -> None:
        self.words = words
        self.tokens = [(match.lastgroup or "", match.group()) for match in TOKEN.finditer(text)]
        self.at = 0

    def look(self, ahead: int = 0) -> tuple[str, str]:
        return self.tokens[self.at + ahead] if self.at + ahead < len(self.tokens) else ("end", "")

    def all(self) -> str:
        pieces = self.pieces("")
        if not pieces or self.at < len(self.tokens):
            raise Unsure
        return joined(pieces)

    def pieces(self, until: str) -> list[Piece]:
        """As far as the closing bracket, which is left; or to the end."""
        found: list[Piece] = []
        while self.look()[0] != "end" and self.look()[1] != until:
            tight = self.look()[0] != "space"
            if not tight:
                self.at += 1
                continue
            before = self.tokens[self.at - 1][0] if self.at else "space"
            piece = self.piece()
            piece.tight = before != "space"
            found.append(piece)
        return found

    def piece(self) -> Piece:
        """One thing with its scripts, or an operator."""
        kind, text = self.look()
        if text in CLOSE:
            raise Unsure
        self.at += 1
        if kind == "number":
            return self.scripts(f"<mn>{text}</mn>")
        if kind == "word":
            return self.scripts(self.word(text))
        if text in OPEN:
            return self.bracketed(text)
        if text == "√":
            return Piece(f"<msqrt>{self.under_root()}</msqrt>", "thing")
        if text in "Σ∏":
            return self.scripts(f"<mo movablelimits='false'>{'∑' if text == 'Σ' else '∏'}</mo>", under=True)
        if text in GREEK or text == "∂":
            return self.scripts(self.over(f"<mi>{text}</mi>"))
        if text == "/":
            if self.look()[1] == "/":
                self.at += 1
                return Piece("<mo>//</mo>", "operator")
            return Piece("<mo>/</mo>", "slash")
        if text in RELATIONS:
            return Piece(f"<mo>{escape(text)}</mo>", "relation")
        if text in "∞…":
            return self.scripts(f"<mi>{text}</mi>")
        if text in "|‖":
            return Piece(f"<mo stretchy='false'>{text}</mo>", "fence")
        if text in OPERATORS:
            return Piece(f"<mo>{text}</mo>", "operator")
        raise Unsure

    def word(self, text: str) -> str:
        """A letter, a function or a name; anything else is prose."""
        if len(text) == 1:
            return self.over(f"<mi>{text}</mi>")
        known = text in self.words and text not in PROSE
        if text in FUNCTIONS or known or self.look()[1] in ("(", "_") or re.fullmatch(r"d[a-zA-Z]", text):
            return f"<mi>{text}</mi>"
        raise Unsure

    def over(self, inner: str) -> str:
        """x̂: the hat over what has been read, if there is one."""
        if self.look()[1] not in HATS:
            return inner
        sign = HATS[self.look()[1]]
        self.at += 1
        return f"<mover accent='true'>{inner}<mo>{sign}</mo></mover>"

    def bracketed(self, text: str) -> Piece:
        """( … ), as it stands."""
        other = CLOSE[OPEN.index(text)]
        drawn = joined(self.pieces(other))
        if self.look()[1] != other:
            raise Unsure
        self.at += 1
        piece = self.scripts(plain := f"<mrow><mo>{text}</mo>{drawn}<mo>{other}</mo></mrow>")
        piece.inner = drawn if text == "(" and piece.xml == plain else ""
        return piece

    def under_root(self) -> str:
        """After √: a bracket without its parentheses, or one thing."""
        if self.look()[1] == "(":
            self.at += 1
            return self.inside(")")
        if self.look()[0] in ("space", "end"):
            raise Unsure
        called = self.look()[0] == "word" and self.look(1)[1] == "("        # √max(n, m): of all of it
        return self.piece().xml + (self.piece().xml if called else "")

    def inside(self, closing: str, small: bool = False) -> str:
        """What stands before a closing bracket, which is passed. In small print fractions stay on the line."""
        drawn = joined(self.pieces(closing), small)
        if self.look()[1] != closing or not drawn:
            raise Unsure
        self.at += 1
        return drawn

    # ---- scripts

    def scripts(self, base: str, under: bool = False) -> Piece:
        """What has been read, with the subscripts and superscripts that follow without a space."""
        low = high = ""
        if base == "<mi>sqrt</mi>" and self.look()[1] == "(":
            self.at += 1
            base = f"<msqrt>{self.inside(')')}</msqrt>"
        while True:
            kind, text = self.look()
            if text == "_" and not low:
                self.at += 1
                low = self.script()
            elif text == "^" and not high:
                self.at += 1
                high = self.script()
            elif text in SUB and kind == "sign" and not low:
                low = self.unicode(SUB)
            elif text in SUPER and kind == "sign" and high in ("", PRIME):
                high = f"<mrow>{high}{self.unicode(SUPER)}</mrow>"
            elif text == "′" and not high:
                self.at += 1
                high = PRIME
            elif text in ("_", "^") or kind == "sign" and (text in SUB or text in SUPER or text == "′"):
                raise Unsure
            else:
                break
        tags = ("munder", "mover", "munderover") if under else ("msub", "msup", "msubsup")
        if low and high:
            return Piece(f"<{tags[2]}>{base}{low}{high}</{tags[2]}>", "big" if under else "thing")
        if low or high:
            tag = tags[0] if low else tags[1]
            return Piece(f"<{tag}>{base}{low}{high}</{tag}>", "big" if under else "thing")
        return Piece(base, "big" if under else "thing")

    def script(self) -> str:
        """After _ or ^: {…}, (…), or a run of letters and digits, with commas that no space follows."""
        if self.look()[1] in ("{", "("):
            closing = CLOSE[OPEN.index(self.look()[1])]
            self.at += 1
            return f"<mrow>{self.inside(closing, small=True)}</mrow>"
        found = []
        if self.look()[1] in ("<", "−", "≤") and self.look(1)[0] in ("word", "number"):
            found.append(f"<mo>{escape(self.look()[1])}</mo>")
            self.at += 1
        while True:
            kind, text = self.look()
            if kind == "word":
                letters = [text] if len(text) > 3 or len(text) == 1 or not text.islower() else list(text)
                found += [f"<mi>{each}</mi>" for each in letters]
            elif kind == "number" and "," not in text:
                found.append(f"<mn>{text}</mn>")
            elif text in GREEK and kind == "sign":
                found.append(f"<mi>{text}</mi>")
            elif text == "," and self.look(1)[0] in ("word", "number") and found:
                found.append("<mo separator='true'>,</mo>")
            else:
                break
            self.at += 1
        if not found:
            raise Unsure
        drawn = f"<mrow>{''.join(found)}</mrow>"
        if self.look()[0] == "sign" and self.look()[1] in SUB:              # 2^lseᵢ: the i belongs to lse
            return f"<msub>{drawn}{self.unicode(SUB)}</msub>"
        return drawn

    def unicode(self, table: dict[str, str]) -> str:
        """A run of raised or lowered characters."""
        run = ""
        while self.look()[0] == "sign" and self.look()[1] in table:
            run += table[self.look()[1]]
            self.at += 1
        drawn = ""
        for part in re.findall(r"\d+|\D", run):
            tag = "mn" if part.isdigit() else "mi" if part.isalpha() else "mo"
            upright = " mathvariant='normal'" if part == "T" else ""
            drawn += f"<{tag}{upright}>{part}</{tag}>"
        return f"<mrow>{drawn}</mrow>"


def fractions(pieces: list[Piece]) -> list[Piece]:
    """Set a / b above each other where one thing stands on each side, and what is next to them binds less."""
    found: list[Piece] = []
    i = 0
    while i < len(pieces):
        piece = pieces[i]
        if piece.kind == "slash" and found and i + 1 < len(pieces):
            top, bottom = found[-1], pieces[i + 1]
            before = found[-2] if len(found) > 1 else None
            after = pieces[i + 2] if i + 2 < len(pieces) else None
            number = before is not None and top.tight and before.xml.startswith("<mn>") and piece.tight
            alone = before is None or before.kind in ("relation", "operator", "big") or (number and (
                len(found) < 3 or found[-3].kind in ("relation", "operator")))
            if before is not None and not alone and piece.tight and not top.tight:
                alone = before.kind in ("thing", "fence")                   # W x/c: only x is tight
            ends = after is None or after.kind in ("relation", "operator") or (bottom.tight and not after.tight
                                                                              and after.kind != "slash")
            if top.kind == bottom.kind == "thing" and alone and ends and len({piece.tight, bottom.tight}) == 1:
                over = before.xml + top.xml if number and before else top.part()
                del found[-2 if number else -1 :]
                fraction = f"<mfrac><mrow>{over}</mrow><mrow>{bottom.part()}</mrow></mfrac>"
                found.append(Piece(fraction, "thing", top.tight))
                i += 2
                continue
        found.append(piece)
        i += 1
    return found


def joined(pieces: list[Piece], small: bool = False) -> str:
    """The fractions set, and a thin space where two things stand side by side: a product, or a function of one."""
    found = pieces if small else fractions(pieces)
    drawn = [piece.xml for piece in found[:1]]
    for before, piece in zip(found, found[1:], strict=False):
        apart = not piece.tight and before.kind == "thing" and piece.kind in ("thing", "big")
        drawn.append(f"<mspace width='0.17em'/>{piece.xml}" if apart else piece.xml)
    return "".join(drawn)

"""Choice of the terms of the training loss by --loss and --ohem."""

import re

from utils.common.errors import UserError

from .cross_entropy import CrossEntropy
from .focal import FocalLoss
from .ohem import BatchOhemCrossEntropy
from .regions import DiceLoss, LovaszSoftmax

TERMS = {"ce": CrossEntropy, "ohem": BatchOhemCrossEntropy, "focal": FocalLoss, "dice": DiceLoss,
         "lovasz": LovaszSoftmax}
TERM = re.compile(r"(?:(?P<factor>\d*\.?\d+)\*)?(?P<name>\w+)")


def parse_terms(text):
    """"ce+0.5*dice,aux=ce" → {"": {"ce": 1.0, "dice": 0.5}, "aux": {"ce": 1.0}}: factors of terms; "" for other heads.

    Raises `UserError` for other texts.
    """
    choice = {}
    for part in text.replace(" ", "").split(","):       # without spaces
        head, _, terms = part.rpartition("=")
        matches = [TERM.fullmatch(term) for term in terms.split("+")]
        factors = {match["name"]: float(match["factor"] or 1) for match in matches if match}
        if head in choice or len(factors) < len(matches) or not factors.keys() <= TERMS.keys() or not all(
                0 < factor <= 1e30 for factor in factors.values()):
            raise UserError("--loss: expected TERMS or HEAD=TERMS,..., such as ce+lovasz or fine=ce+0.5*dice,aux=ce, "
                            f"each head and in it each of {', '.join(TERMS)} once, found {text[:80]!r}")
        choice[head] = factors
    return choice


def choose_terms(text, heads, *, ohem=False, parts=1):
    """Choose the terms of heads.

    Args:
        text: as in `parse_terms`; heads that it leaves out have cross-entropy.
        heads: names of the outputs of the network.
        ohem: whether OHEM replaces the cross-entropy of "fine".
        parts: number of parts in which a batch is processed.

    Returns:
        {head: {name of the term: factor}}.

    Raises:
        UserError: if the text, its heads or its terms do not fit.
    """
    choice = parse_terms(text)
    if unknown := choice.keys() - {"", *heads}:
        raise UserError(f"--loss: expected heads from {', '.join(heads)}, those of the --model, found "
                        f"{', '.join(sorted(unknown))[:80]!r}")
    terms = {head: choice.get(head) or choice.get("") or {"ce": 1.0} for head in heads}
    if ohem and "ohem" not in terms.get("fine", "ohem"):
        if "ce" not in terms["fine"]:
            raise UserError(f"--ohem 1: expected cross-entropy in the loss of fine, found --loss {text}; add the term "
                            "ohem there, or omit --ohem")
        terms["fine"] = {"ohem" if name == "ce" else name: factor for name, factor in terms["fine"].items()}
    whole = {name for factors in terms.values() for name in factors if TERMS[name].needs_whole_batch}
    if parts > 1 and whole:
        raise UserError(f"--accumulate {parts}: expected a --loss of terms that can be split, found "
                        f"{', '.join(sorted(whole))}, whose gradient in each part depends on the other parts; "
                        "--recompute also saves memory")
    return terms

"""Checking all laws with one call, for third-party methods."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from inlay.core.contracts.method import Method
from inlay.core.errors import problems
from inlay.testing.laws import LAWS, Law, refusal
from inlay.testing.models import ZOO
from inlay.testing.specimen import Specimen


def check_law(specimen: Specimen, method: Method, name: str, law: Law) -> None:
    """Check one law for one method instance on one model.

    A law in the method's `expected_failures` must fail: an unexpected pass is an error too, so that no exception
    outlives its reason.

    Raises:
        AssertionError: the law does not hold, or holds although it was expected to fail.
    """
    reason = method.expected_failures.get(name)
    if reason is None:
        law(specimen, method)
        return
    try:
        law(specimen, method)
    except AssertionError:
        return
    raise AssertionError(f"{name} was expected to fail ({reason}) but holds; take it out of expected_failures")


def check_method(
    method: type[Method], specimens: Iterable[Specimen] | None = None, laws: Mapping[str, Law] | None = None
) -> None:
    """Check every law for every example of a method on every model to which it can be attached.

    Args:
        specimens: models to try; None means the whole zoo.
        laws: name → law; None means all fast ones.

    Raises:
        AssertionError: lists every law that does not hold, with model and hyper-parameters, or says that the method
            could not be attached to any of the models.
    """
    wrong, tried = [], 0
    for specimen in ZOO.values() if specimens is None else specimens:
        for example in method.examples():
            if refusal(specimen, example) is not None:
                continue
            tried += 1
            for name, law in (LAWS if laws is None else laws).items():
                try:
                    check_law(specimen, example, name, law)
                except Exception as error:
                    wrong.append(f"{name}, {specimen.name}, {example}: {type(error).__name__}: {error}")
    if not tried:
        wrong.append("it could not be attached to any of the models")
    if wrong:
        raise AssertionError(problems(f"method {method.name!r} breaks the laws", wrong))

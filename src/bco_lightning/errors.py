"""The errors a user can meet; each says where, what was expected, what was found and what to do."""

from __future__ import annotations

from collections.abc import Sequence


def printable(text: str) -> str:
    """A text whose control characters, line breaks apart, are replaced: a terminal would do what they say."""
    return "".join(character if character.isprintable() or character == "\n" else "\ufffd" for character in text)


class UserError(ValueError):
    """An error that the user can mend; the command line prints it as one message, without a traceback.

    ``problem`` says in one sentence what was expected and what was found, and never holds a row's text.
    """

    def __init__(self, where: str, problem: str, remedy: str = "") -> None:
        where, problem, remedy = printable(where).replace("\n", "\ufffd"), printable(problem), printable(remedy)
        self.where, self.problem, self.remedy = where, problem, remedy
        super().__init__(f"{where}: {problem}{' ' + remedy if remedy else ''}")

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str, str]]:
        # Exceptions pickle by their message alone, which would break errors raised in loader workers.
        return type(self), (self.where, self.problem, self.remedy)


class FeedbackRowError(UserError):
    """A row, or a whole source of rows, that cannot be trained on as it stands."""

    def as_fields(self) -> dict[str, str]:
        """Where it is and why, also in parts, for a list of such errors."""
        expected, _, found = self.problem.removeprefix("expected ").rstrip(".").partition(", found ")
        parts = {"expected": expected, "found": found, "remedy": self.remedy}
        return {"place": self.where, "reason": self.problem, **parts}

    def without_cause(self) -> FeedbackRowError:
        """The same error without what led to it: causes and tracebacks hold whole lines of the log."""
        return FeedbackRowError(self.where, self.problem, self.remedy)


class ConfigError(UserError):
    """Options that do not fit together, or with what they name."""


def check_choice(option: str, value: object, choices: Sequence[object]) -> None:
    """Refuses a word that an option does not know; the command line does so by itself, Python does not."""
    if value not in choices:
        raise ConfigError(option, f"expected {' or '.join(map(str, choices))}, found {value!r}.")


class LanguageModelError(UserError):
    """A model or tokenizer that cannot be loaded, or not be aligned by this package."""


class NonFiniteError(UserError):
    """A log-prob, loss, gradient or weight that is not a finite number, noticed before it did harm."""


class CheckpointError(UserError):
    """A checkpoint that does not belong to this run or cannot be used."""


class UnsafeCheckpointError(CheckpointError):
    """A checkpoint that holds more than tensors and plain values, and could run code if it were unpickled."""


class FaultError(UserError):
    """A fault of the machine or of another process, in words: out of memory, a killed worker, a rank that is gone."""


class PreemptedError(SystemExit):
    """A run that was asked to stop, and did so at an optimizer-step boundary with everything saved.

    As a ``SystemExit`` it ends a script with the status that shells give a signal, 128 plus its number, and prints no
    traceback. It tells the signal, the optimizer steps done, and where the state is; nothing if no step was under way.
    """

    def __init__(self, signal_number: int, step: int = 0, checkpoint: str = "") -> None:
        super().__init__(128 + signal_number)
        self.signal_number, self.step, self.checkpoint = signal_number, step, checkpoint


def causes_of(error: BaseException | None) -> list[BaseException]:
    """An error and what led to it, the nearest first."""
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain

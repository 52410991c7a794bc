"""Objectives by the names that ``model.objective`` has for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from bco_lightning.errors import ConfigError, check_choice
from bco_lightning.objectives.bco import BCE, BCO, class_weights_of
from bco_lightning.objectives.kldo import KLDO
from bco_lightning.objectives.kto import KTO, APOZero
from bco_lightning.objectives.mix import Mix
from bco_lightning.objectives.objective import Objective
from bco_lightning.objectives.pairs import DPO, IPO, NCA
from bco_lightning.objectives.sft import SFT
from bco_lightning.objectives.shifts import BCOByLength, BCOPerPrompt
from bco_lightning.objectives.una import UNA
from bco_lightning.options import ModelOptions

OBJECTIVES: dict[str, type[Objective]] = {
    "bco": BCO, "bce": BCE, "kto": KTO, "apo_zero": APOZero, "kldo": KLDO, "una": UNA, "dpo": DPO, "ipo": IPO,
    "nca": NCA, "sft": SFT,
}  # fmt: skip
_OTHER_SHIFTS: dict[str, type[Objective]] = {"per_prompt": BCOPerPrompt, "by_length": BCOByLength}


def objective_of(options: ModelOptions) -> Objective:
    """The objective that a run's options name.

    Raises:
        ConfigError: If other options do not go with it.
    """
    objective = make_objective(options.objective, options.reward_shift_decay, place="model.objective")
    if options.reward_shift != "global":
        check_choice("model.objective", str(options.objective), ["bco"])  # with another shift than one
        objective = _OTHER_SHIFTS[options.reward_shift](options.reward_shift_decay)
    if options.importance_weights != "off" and not objective.takes_importance:
        able = [name for name, kind in OBJECTIVES.items() if kind.takes_importance]
        problem = f"expected off with model.objective {options.objective}, found another."
        remedy = f"Objectives that weigh thumbs-down rows: {', '.join(able)}."
        raise ConfigError("model.importance_weights", problem, remedy)
    if options.reference_log_probs == "before" and objective.takes_unrelated:
        problem = f"expected online with model.objective {options.objective}, found before."
        remedy = "It also scores answers to other prompts, which are known in a step only."
        raise ConfigError("model.reference_log_probs", problem, remedy)
    return objective


def chosen_class_weights(
    options: ModelOptions, objective: Objective, frequencies: Callable[[], tuple[float, float] | None]
) -> tuple[float, float]:
    """Weights of thumbs-up and thumbs-down rows: those given, or of the class frequencies; 1 and 1 of scores alone."""
    if not isinstance(options.class_weights, str):
        return options.class_weights
    if options.class_weights == "none" or not objective.takes_class_weights:
        return 1.0, 1.0
    if (shares := frequencies()) is None:
        problem = "expected two numbers or 'none' where no FeedbackDataModule is used, found 'auto'."
        raise ConfigError("model.class_weights", problem)
    return class_weights_of(*shares)


def make_objective(named: str | Mapping[str, float], decay: float = 0.9, *, place: str = "objective") -> Objective:
    """The objective of that name, or of several names with their weights a :class:`Mix`.

    Raises:
        ConfigError: If there is no such objective; ``place`` says where it is named.

    Example:
        >>> make_objective({"bco": 1, "sft": 0.1}).sum_names
        ()
    """
    for name in [named] if isinstance(named, str) else named:
        check_choice(place, name, list(OBJECTIVES))
    if isinstance(named, str):
        return OBJECTIVES[named](decay)
    return Mix({name: OBJECTIVES[name](decay) for name in named}, named, decay)

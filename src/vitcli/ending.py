"""When a run ends before its last step, and which of its weights are the result.

Early stopping goes by the evaluations alone, which metrics.jsonl keeps, so a resumed run ends where one that was never
interrupted does.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

from vitcli.checkpoint import load_checkpoint
from vitcli.config import Config
from vitcli.distributed import Engine, States
from vitcli.errors import CheckpointError
from vitcli.step import State

__all__ = ["best_step", "evals_since_best", "is_stalled", "return_to_best", "scores_of"]

Evals = Mapping[int, Mapping[str, Any]]  # what was logged of each evaluation, by the step it came after


def scores_of(config: Config, evals: Evals) -> dict[int, float]:
    """Return a score of each evaluation, higher for better ones and NaN where it was not finite.

    It is `log.best_metric`, or minus the loss. Early stopping asks for progress, which a top-1 on a few pictures shows in large
    steps, so there it is the place in an order in which, of equal ones, a lower loss is better.
    """
    metric = config.log.best_metric

    def numbers(row: Mapping[str, Any]) -> tuple[float, float]:
        value, loss = (math.nan if row[key] is None else float(row[key]) for key in (metric, "loss"))
        return -loss if metric == "loss" else value, -loss if math.isfinite(loss) else -math.inf

    found = {step: numbers(row) for step, row in evals.items()}
    if config.train.early_stop_evals is None:
        return {step: value for step, (value, _) in found.items()}
    in_order = sorted({pair for pair in found.values() if math.isfinite(pair[0])})
    places = {pair: float(place) for place, pair in enumerate(in_order)}
    return {step: places.get(pair, math.nan) for step, pair in found.items()}


def best_step(scores: Mapping[int, float]) -> int | None:
    """Return the step with the best score, of equal ones the last, as `retention.kept_steps`; None if none is finite."""
    finite = [step for step in scores if math.isfinite(scores[step])]
    return max(finite, key=lambda step: (scores[step], step), default=None)


def evals_since_best(scores: Mapping[int, float], *, first_step: int = 0) -> int:
    """Return how many evaluations there were since the best score was reached for the first time.

    Args:
        first_step: evaluations up to this step do not count.
    """
    best = best_step(scores)
    reached = min((step for step in scores if best is not None and scores[step] == scores[best]), default=0)
    return sum(step > max(reached, first_step) for step in scores)


def is_stalled(config: Config, evals: Evals) -> bool:
    """Tell whether a run has gone on for as many evaluations without a better one as its config allows."""
    patience = config.train.early_stop_evals
    # what the head reached alone is no yardstick for how long everything may take
    first_step = config.train.head_first_steps
    return patience is not None and evals_since_best(scores_of(config, evals), first_step=first_step) >= patience


def return_to_best(state: State, engine: Engine, config: Config, evals: Evals, *, say: Callable[[str], object]) -> bool:
    """Put the weights of the best evaluation in place of the last ones, and tell whether they are others.

    Where their checkpoint is damaged the last ones stay, and that is said. All ranks must call it; rank 0's evaluations count.
    """
    ranks, saved, best = engine.ranks, None, state.step
    assert config.out is not None
    if ranks.main:
        found = best_step(scores_of(config, evals))
        if found is not None and found != state.step:
            try:
                saved = load_checkpoint(config.out / "checkpoints" / f"step_{found:08d}")
                best = saved.step
            except CheckpointError as error:
                say(f"warning: {error}; the weights of step {state.step:,} are the result")
    best = ranks.broadcast(best)
    if best == state.step:
        return False
    say(f"the best {config.log.best_metric} was after step {best:,}; those weights are the result")
    states = None if saved is None else States(saved.model_state, saved.optimizer_state, saved.ema_state)
    engine.load_states(states, state.optimizer, state.ema)
    state.step = best
    return True

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


def scores_of(config: Config, evals: Evals, *, examples: int) -> dict[int, float]:
    """Return a score of each evaluation, higher for better ones and NaN where it was not finite.

    It is `log.best_metric`, or minus the loss. For early stopping all within a standard error of the best accuracy score as it
    does: on a few pictures the highest of twenty accuracies is luck, and of equal ones the last, trained longest, is taken.

    Args:
        examples: images of an evaluation.
    """
    metric = metric_of(config)
    sign = -1.0 if metric == "loss" else 1.0
    scores = {step: math.nan if row[metric] is None else sign * row[metric] for step, row in evals.items()}
    best = max((score for score in scores.values() if math.isfinite(score)), default=math.nan)
    if config.train.early_stop_evals is None or metric == "loss":
        return scores
    share = (best * examples + 2) / (examples + 4)  # Agresti and Coull: at 100 % too there is an error
    enough = best - math.sqrt(share * (1 - share) / examples)
    return {step: best if score >= enough else score for step, score in scores.items()}


def metric_of(config: Config) -> str:
    """Return what evaluations are compared by: `log.best_metric`, or the loss, which alone a run without labels has."""
    return config.log.best_metric if config.objective.needs_labels else "loss"


def best_step(scores: Mapping[int, float]) -> int | None:
    """Return the step with the best score, of equal ones the last, as `retention.kept_steps`; None if none is finite."""
    finite = [step for step in scores if math.isfinite(scores[step])]
    return max(finite, key=lambda step: (scores[step], step), default=None)


def evals_since_best(scores: Mapping[int, float], *, first_step: int = 0) -> int:
    """Return how many evaluations there were since the best one.

    Args:
        first_step: evaluations up to this step do not count.
    """
    best = best_step(scores) or 0
    return sum(step > max(best, first_step) for step in scores)


def is_stalled(config: Config, evals: Evals, *, examples: int) -> bool:
    """Tell whether a run has gone on for as many evaluations without one as good as the best as its config allows."""
    patience = config.train.early_stop_evals
    # what the head reached alone is no yardstick for how long everything may take
    first_step = config.train.head_first_steps
    scores = scores_of(config, evals, examples=examples)
    return patience is not None and evals_since_best(scores, first_step=first_step) >= patience


def return_to_best(
    state: State, engine: Engine, config: Config, evals: Evals, *, examples: int, say: Callable[[str], object]
) -> bool:
    """Put the weights of the best evaluation in place of the last ones, and tell whether they are others.

    Where their checkpoint is damaged the last ones stay, and that is said. All ranks must call it; rank 0's evaluations count.
    """
    ranks, saved, best = engine.ranks, None, state.step
    assert config.out is not None
    if ranks.main:
        found = best_step(scores_of(config, evals, examples=examples))
        if found is not None and found != state.step:
            try:
                saved = load_checkpoint(config.out / "checkpoints" / f"step_{found:08d}")
                best = saved.step
            except CheckpointError as error:
                say(f"warning: {error}; the weights of step {state.step:,} are the result")
    best = ranks.broadcast(best)
    if best == state.step:
        return False
    say(f"{metric_of(config)} got worse after step {best:,}; the weights of that step are the result")
    states = None if saved is None else States(saved.model_state, saved.optimizer_state, saved.ema_state)
    engine.load_states(states, state.optimizer, state.ema)
    state.step = best
    return True

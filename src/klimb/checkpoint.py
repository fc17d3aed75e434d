"""What a checkpoint holds: everything that the next step depends on, as named tensors and as JSON.

Weights (float32 masters), optimizer, scheduler, average, generator, the critic and its optimizer where there is one, the
prompts still to come, the replay, and the running or learned log Z where there is one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from klimb import store
from klimb.data import Draws
from klimb.log_z import LearnedLogZ
from klimb.models.critic import Critic
from klimb.models.master import masters, write_out
from klimb.models.sharded import gathered, parted
from klimb.numbers.running import RunningLogZ
from klimb.samplers.ahead import Ahead
from klimb.samplers.replay import Kept, Replay
from klimb.steps import TrainState


@dataclass(frozen=True)
class Moving:
    """What a training changes in place, step by step, besides its `TrainState`.

    Attributes:
        parameters: the tensors that the model computes with.
        optimizer: of their float32 masters.
        scheduler: of its learning rate.
        generator: of all draws.
        average: moving averages of the masters; empty where none is kept.
        critic: learns what reward to expect; None where the method has none.
        critic_optimizer: of its parameters.
    """

    parameters: Sequence[Tensor]
    optimizer: torch.optim.Optimizer
    scheduler: torch.optim.lr_scheduler.LRScheduler
    generator: torch.Generator
    average: list[Tensor]
    critic: Critic | None = None
    critic_optimizer: torch.optim.Optimizer | None = None

    @property
    def result(self) -> Sequence[Tensor]:
        """The weights to be measured and saved: the average where there is one."""
        return self.average or masters(self.optimizer)


def saved(state: TrainState, moving: Moving) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Everything that the next step depends on, as named tensors and as JSON; where layers are split all ranks call this together."""
    own = masters(moving.optimizer)
    assert len(moving.parameters) == len(own)
    kept = [row for rows in state.replay.rows.values() for row in rows]
    tensors = {
        **{f"weights.{i}": gathered(m) for i, m in enumerate(own)},
        **{f"average.{i}": gathered(a) for i, a in enumerate(moving.average)},
        **_slots("optimizer", moving.optimizer),
        "generator": moving.generator.get_state(),
        "replay.tokens": torch.cat([torch.zeros(0, dtype=torch.int64), *(row.completion for row in kept)]),
        "replay.lengths": torch.tensor([len(row.completion) for row in kept], dtype=torch.int64),
        "replay.numbers": torch.tensor(
            [[math.nan if row.log_q is None else row.log_q, row.log_ref, row.reward] for row in kept],
            dtype=torch.float64,
        ),
    }
    ahead = [(one, one.draws()) for one in state.ahead]  # waits: what was drawn must not be lost
    for i, (_, draws) in enumerate(ahead):
        tensors |= _of_draws(f"ahead.{i}", draws)
    if state.log_z is not None:
        tensors |= {f"log_z.{name}": x for name, x in vars(state.log_z).items()}
    if moving.critic_optimizer is not None:
        tensors |= {f"critic.{i}": p.detach() for i, p in enumerate(masters(moving.critic_optimizer))}
        tensors |= _slots("critic_optimizer", moving.critic_optimizer)
    rest = {
        "step": state.step,
        "order": list(state.order),
        "beta": state.beta,
        "ahead": [
            {
                "step": one.step,
                "version": one.version,
                "prompts": list(one.prompts),
                "texts": draws.texts,
                "full_support": draws.full_support,
                "own_law": draws.own_law,
            }
            for one, draws in ahead
        ],
        "learning_rates": [group["lr"] for group in moving.optimizer.param_groups],
        "scheduler": {
            name: x for name, x in moving.scheduler.state_dict().items() if isinstance(x, int | float | list)
        },
        "replay": {
            "counts": [[name, len(rows)] for name, rows in state.replay.rows.items()],
            "texts": [row.text for row in kept],
            "finished": [row.finished for row in kept],
            "full_support": [row.full_support for row in kept],
            "limit": state.replay.limit,
        },
    }
    return tensors, json.loads(json.dumps(rest))


def restore(checkpoint: store.Checkpoint, moving: Moving, *, replay: Replay) -> TrainState:
    """Put everything that moves as it was when `saved` looked at it."""
    tensors, rest = checkpoint.tensors, checkpoint.state
    own = masters(moving.optimizer)
    expected = {f"weights.{i}": m.shape for i, m in enumerate(own)}
    if {name: t.shape for name, t in tensors.items() if name.startswith("weights.")} != expected:
        raise ValueError(
            "the checkpoint holds weights of other shapes; resume the run with its own configuration"
        )
    with torch.no_grad():
        for i, master in enumerate(own):
            master.copy_(parted(tensors[f"weights.{i}"], master))
        for i, mean in enumerate(moving.average):
            mean.copy_(parted(tensors[f"average.{i}"], mean))
    write_out(own, moving.parameters)
    _take_slots("optimizer", moving.optimizer, tensors)
    if moving.critic_optimizer is not None:
        with torch.no_grad():
            for i, parameter in enumerate(masters(moving.critic_optimizer)):
                parameter.copy_(tensors[f"critic.{i}"])
        _take_slots("critic_optimizer", moving.critic_optimizer, tensors)
    for group, lr in zip(moving.optimizer.param_groups, rest["learning_rates"], strict=True):
        group["lr"] = lr
    moving.scheduler.load_state_dict({**moving.scheduler.state_dict(), **rest["scheduler"]})
    moving.generator.set_state(tensors["generator"])
    log_z = {name.removeprefix("log_z."): x for name, x in tensors.items() if name.startswith("log_z.")}
    return TrainState(
        rest["step"],
        tuple(rest["order"]),
        _replay(tensors, rest["replay"], replay),
        (LearnedLogZ if "value" in log_z else RunningLogZ)(**log_z) if log_z else None,
        rest["beta"],
        tuple(_ahead(f"ahead.{i}", one, tensors) for i, one in enumerate(rest.get("ahead", ()))),
    )


def _of_draws(kind: str, draws: Draws) -> dict[str, Tensor]:
    rows = [ids for group in draws.completions for ids in group]
    assert draws.log_q is not None
    return {
        f"{kind}.tokens": torch.cat(rows),
        f"{kind}.lengths": draws.lengths,
        f"{kind}.finished": draws.finished,
        f"{kind}.log_q": draws.log_q,
        **({} if draws.token_log_q is None else {f"{kind}.token_log_q": _packed(draws)}),
    }


def _packed(draws: Draws) -> Tensor:
    assert draws.packed_log_q is not None
    return draws.packed_log_q


def _ahead(kind: str, one: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Ahead:
    """Draws begun for a step to come; their examples are put back by whoever takes them."""
    lengths = tensors[f"{kind}.lengths"]

    def ragged(name: str) -> list[list[Tensor]]:
        rows = iter(tensors[f"{kind}.{name}"].split(lengths.flatten().tolist()))
        return [[next(rows) for _ in group] for group in lengths]

    draws = Draws(
        examples=[],
        completions=ragged("tokens"),
        finished=tensors[f"{kind}.finished"],
        texts=one["texts"],
        log_q=tensors[f"{kind}.log_q"],
        full_support=one["full_support"],
        own_law=one["own_law"],
        token_log_q=ragged("token_log_q") if f"{kind}.token_log_q" in tensors else None,
    )
    return Ahead(one["step"], one["version"], tuple(one["prompts"]), lambda: draws)


def _slots(kind: str, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What an optimizer remembers of each tensor, by name."""
    return {
        f"{kind}.{i}.{name}": gathered(x)
        for i, slots in optimizer.state_dict()["state"].items()
        for name, x in slots.items()
    }


def _take_slots(kind: str, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    own = masters(optimizer)
    slots: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        first, _, rest_of_name = name.partition(".")
        if first == kind:
            index, _, slot = rest_of_name.partition(".")
            # what is remembered of each number of a tensor is split as the tensor is
            of_each = tensor.shape == own[int(index)].shape
            here = parted(tensor, own[int(index)]) if of_each else tensor
            slots.setdefault(int(index), {})[slot] = here
    optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})


def _replay(tensors: Mapping[str, Tensor], rest: Mapping[str, Any], empty: Replay) -> Replay:
    completions = tensors["replay.tokens"].split(tensors["replay.lengths"].tolist())
    numbers = tensors["replay.numbers"].tolist()
    kept = iter(
        [
            Kept(
                completion,
                text,
                finished,
                None if math.isnan(log_q) else log_q,
                log_ref,
                reward,
                full_support,
            )
            for completion, text, finished, (log_q, log_ref, reward), full_support in zip(
                completions, rest["texts"], rest["finished"], numbers, rest["full_support"], strict=True
            )
        ]
    )
    rows = {name: [next(kept) for _ in range(count)] for name, count in rest["counts"]}
    return replace(empty, rows=rows, limit=rest["limit"])

"""What a training that was stopped needs to go on as an unbroken one would have: taken after an update, put back later.

A state is the student's weights, all that Adam and fp16's scaler know, and, where points that the student drew serve
further updates, these points. Random draws need none, for each is keyed by what it is for.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esd import checkpoint
from esd.errors import UserError
from esd.plan import TrainPlan
from esd.sources import Source
from esd.storage import State, load_state
from esd.weights import Views

ADAM = "adam."  # before what Adam remembers, in the names of a state's files


def identity_of(plan: TrainPlan, views: Views, accelerator: Any) -> dict[str, Any]:
    """What must be the same for a state to be put back, as JSON has it."""
    return {
        "plan": json.loads(json.dumps(asdict(replace(plan, save_every=0)))),  # how often a state is saved changes none
        "base": checkpoint.fingerprint(views.base),
        "number of processes": accelerator.num_processes,
        "mixed precision": accelerator.mixed_precision,
    }


def state(
    step: int,
    views: Views,
    adam: torch.optim.Optimizer,
    scaler: Any,
    identity: Mapping[str, Any],
    seconds: float,
    in_use: Mapping[str, Tensor],
) -> State:
    """What resuming after `step` updates needs: the student's weights, all that Adam and fp16's scaler know, the time
    spent.

    And, where points that the student drew serve further updates, these points.
    """
    groups: dict[str, dict[str, Tensor]] = {"student": views.values()}
    stepped = 0
    for name, parameter in views.named_parameters().items():
        for fact, value in adam.state[parameter].items():
            if fact == "step":
                stepped = int(value)
            else:
                groups.setdefault(ADAM + fact, {})[name] = value.to("cpu", copy=True)  # some are shared
    if in_use:
        groups["points"] = dict(in_use)
    scale = scaler.state_dict() if scaler else None
    return State(step, groups, {"identity": identity, "seconds": seconds, "stepped": stepped, "scaler": scale})


def resume(
    folder: Path,
    views: Views,
    adam: torch.optim.Optimizer,
    scaler: Any,
    identity: Mapping[str, Any],
    erasing: Source,
) -> tuple[int, float]:
    """Puts the newest valid state into the student, Adam, fp16's scaler and the source of points that the
    student drew.

    Returns:
        (updates done, seconds spent); zeros where no state is.

    Raises:
        UserError: the state is of another plan, base, number of processes or mixed precision.
    """
    saved = load_state(folder)
    if saved is None:
        return 0, 0.0
    known: Mapping[str, Any] = saved.facts["identity"]
    if odd := [name for name in {**identity, **known} if known.get(name) != identity.get(name)]:
        there, here = (facts.get(odd[0]) for facts in (known, identity))
        told = f": {there} there, {here} here" if odd[0] not in ("plan", "base") else ""
        raise UserError(
            f"{folder} holds the state of a run with another {odd[0]}{told}; start it as it was started, choose "
            "another run_dir, or remove it"
        )
    if in_use := saved.tensors.get("points"):
        erasing.put_back(saved.step, in_use)
    views.load_values(saved.tensors["student"])
    stepped = saved.facts["stepped"]  # fewer than updates where fp16 overflowed
    facts = {group.removeprefix(ADAM): found for group, found in saved.tensors.items() if group.startswith(ADAM)}
    for name, parameter in views.named_parameters().items():
        if known := {fact: found[name].to(parameter.device) for fact, found in facts.items() if name in found}:
            step = torch.tensor(float(stepped)) if isinstance(adam, torch.optim.Adam) else stepped  # one for each
            adam.state[parameter] = {"step": step, **known}
    if scaler:
        scaler.load_state_dict(saved.facts["scaler"])
    return saved.step, float(saved.facts["seconds"])

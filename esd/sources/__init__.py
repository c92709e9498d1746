"""Where training points come from: two strategies behind one call, `points(step, indices)`.

ESD has no data set. It trains at noisy latents that the model itself passes through on the way from pure
noise to a picture of the concept: run the sampler with guidance from x_T, stop at a random step, and that
x_t is the training point.

`OnPolicy`  a fresh partial rollout for every sample of every update, by the student as it is now (the paper)
            or by the teacher (upstream's scripts since 2024). Costs up to `num_steps` guided calls an update,
            or, where the points of `staleness` updates are drawn at once, as many larger calls for all of them.
`Bank`      with a frozen sampler, one whole rollout visits `num_steps` training points, and the two halves
            of its guided batch *are* the teacher's predictions for the concept and for the null prompt, so
            they are free. Points of one rollout are correlated; `rollouts` and `reuse` say how much. The student can
            fill a bank too: nothing is free then, but every point of a rollout can still be used, for at most
            `staleness` updates.

Free predictions need all of this: the teacher samples, and x is what it was given there; there is
classifier-free guidance (else only the concept's is free); the objective's null is the rollout's negative
prompt; a model that is told its guidance scale is told the same while sampling and for the target; t is the
visited time, not a jittered one; and the prompt is the one rolled out with (so `erase_from` and null are free,
the concept costs a call). What is wanted and missing is computed, in batched calls.

Every draw is keyed by (seed, purpose, step, index), see `esd.seeding`: a resumed run replays them. What the student
draws depends on its weights too, those of the first update that the points serve. They are gone when a run resumes amid
these updates, so the points are saved (`in_use`, `put_back`): a thousandth of what the weights would take.

Source: ESD section 4 and its algorithm (on-policy); rohitgandikota/erasing, esd_sd.py (frozen sampler); the
bank is ours.
"""

from .bank import Bank
from .on_policy import OnPolicy
from .points import Conditions, Points
from .source import ALL, Sampling, Source, dealt

__all__ = ["ALL", "Bank", "Conditions", "OnPolicy", "Points", "Sampling", "Source", "dealt"]

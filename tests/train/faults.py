"""Ranks with a planted fault: `python -m tests.train.faults train ...` raises on rank 1."""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist

from hfpp import cli
from hfpp.train import launcher, loop

train_as_local_rank = launcher._train_as_local_rank  # tests put the ranks below in its place


def rank_with_a_wrong_gradient(index, report, **job):
    """The second rank's gradients are a little too large, as if one microbatch counted twice.

    Those of its layers: the copies of a tied weight are compared before every step.
    """
    right = loop.clip_grad_norm_

    def wrong(parts, max_norm):
        if index == 1:
            for name, parameter in (p for part in parts for p in part.named_parameters()):
                if ".layers." in name:
                    parameter.grad.mul_(1.125)
        return right(parts, max_norm)

    loop.clip_grad_norm_ = wrong
    train_as_local_rank(index, report, **job)


def rank_with_a_wrong_weight(index, report, **job):
    """A weight of the last stage is not the model's: not a tied one, whose ends are compared."""
    right = loop.pipeline_model

    def wrong(*arguments, **settings):
        pipeline = right(*arguments, **settings)
        if pipeline.has_last_stage:
            with torch.no_grad():
                pipeline.model_parts[-1].get_parameter("model.norm.weight").mul_(1.01)
        return pipeline

    loop.pipeline_model = wrong
    train_as_local_rank(index, report, **job)


def rank_with_a_lost_gradient(index, report, **job):
    """A gradient of the first stage overflows; its loss does not show it in this step."""
    right = loop.clip_grad_norm_

    def wrong(parts, max_norm):
        if index == 0:
            next(iter(parts[0].parameters())).grad.view(-1)[0] = torch.inf
        return right(parts, max_norm)

    loop.clip_grad_norm_ = wrong
    train_as_local_rank(index, report, **job)


def _failing(_parts, _max_norm):
    if dist.get_rank() == 1:
        raise KeyError("a name\nover lines")
    return torch.zeros(())


if __name__ == "__main__":
    if os.environ["RANK"] == "1":
        loop.clip_grad_norm_ = _failing
    sys.exit(cli.main())

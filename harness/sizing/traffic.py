"""Bytes that a rank sends in a step, by collective, as rings send them."""

from harness.sizing.setting import Setting


def traffic_of(parameters: int, setting: Setting) -> dict[str, int]:
    """Bytes that each rank sends in a step to train so many parameters, by collective.

    A ring sends (N - 1) / N of the data for a gather or a scatter, twice that for an all-reduce.
    DeepSpeed reduces at the boundary at stages 0 and 1, in every micro-batch at 2 and 3; stages 1
    and 2 all-reduce (use_multi_rank_bucket_allreduce). The optimizer's own are not in it.
    """
    once = parameters * setting.itemsize * (setting.ranks - 1) // setting.ranks
    times = setting.accumulation
    if setting.stage == 0:
        return {"all-reduce gradients": 2 * once}
    if setting.stage == 3:
        return {
            "all-gather weights": 2 * once * times,
            "reduce-scatter gradients": once * times,
        }
    reductions = times if setting.stage == 2 else 1
    return {"all-reduce gradients": 2 * once * reductions, "all-gather weights": once}

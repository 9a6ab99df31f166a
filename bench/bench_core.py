"""The native core against plain Python, against filling memory and against torch's meta tensors."""

import ctypes
import subprocess
import sys
import time

import measure
from measure import Target, Timing, ratio, seconds, take_turns

import hfpp
from hfpp.plan import partition, tensor_shapes

RANKS = (1_000, 10_000, 100_000)
LAYERS_PER_STAGE = 8
SIZES = {"microbatch_size": 1, "seq_len": 4096, "hidden_size": 8192, "vocab_size": 128_256}

NOTE = """\
Medians, and in brackets the 10th and 90th percentiles. The competitors of a row take turns of some
milliseconds in one process, quick calls repeated within a turn; their results are compared before
they are timed. A fill writes as many bytes as the table has: into memory allocated for it, or into
memory that was touched before."""


# ---- the other side


def stages_of_rank(pp_rank: int, pp_size: int, num_stages: int, style: str) -> tuple[int, ...]:
    """One rank's stages in O(stages per rank), in Python."""
    if style == "v":
        return (pp_rank, num_stages - 1 - pp_rank)
    return tuple(range(pp_rank, num_stages, pp_size))


def fqn_lists(num_stages: int, num_layers: int) -> list[list[str]]:
    """The module names of every stage, as one writes it in Python when it should be fast."""
    each, longer = divmod(num_layers, num_stages)
    lists, begin = [], 0
    for stage in range(num_stages):
        end = begin + each + (stage < longer)
        names = [f"model.layers.{layer}" for layer in range(begin, end)]
        if stage == 0:
            first = ["model.embed_tokens", *(f"model.{n}" for n in partition.MULTIMODAL_NAMES)]
            names[:0] = first
        if stage == num_stages - 1:
            names += ["model.norm", "lm_head"]
        names.append("model.rotary_emb")
        lists.append(names)
        begin = end
    return lists


def warm_fill(size: int):
    """Filling memory that is there already and has been touched."""
    target = (ctypes.c_char * size)()
    return lambda: ctypes.memset(target, 1, size)


def fresh_fill(size: int):
    """Filling memory that is allocated for it, as a table's is."""
    return lambda: b"\x01" * size


# ---- the three groups


def placement_rows(targets: list[Target]) -> str:
    rows = []
    for ranks in RANKS:
        for style, per_rank in (("loop", 2), ("v", 2), ("loop", 4)):
            num_stages = ranks * per_rank
            table = hfpp.stage_ids_by_rank(ranks, num_stages, style)
            assert memoryview(table).tolist() == [
                list(stages_of_rank(rank, ranks, num_stages, style)) for rank in range(ranks)
            ]
            times = take_turns(
                {
                    "native": lambda r=ranks, n=num_stages, s=style: hfpp.stage_ids_by_rank(
                        r, n, s
                    ),
                    "python": lambda r=ranks, n=num_stages, s=style: [
                        stages_of_rank(rank, r, n, s) for rank in range(r)
                    ],
                    "fresh": fresh_fill(table.nbytes),
                    "warm": warm_fill(table.nbytes),
                },
                budget=2.0,
            )
            speedup = ratio(times["python"], times["native"])
            of_fill = ratio(times["native"], times["fresh"])
            of_warm = ratio(times["native"], times["warm"])
            name = f"{ranks:,} ranks, {style} x{per_rank}"
            rows.append(
                (
                    name,
                    str(times["native"]),
                    str(times["python"]),
                    f"{speedup:,.0f}x",
                    str(times["fresh"]),
                    f"{of_fill:.2g}",
                    seconds(times["warm"].median),
                    f"{of_warm:.2g}",
                )
            )
            fills = f"{of_fill:.2g} of a fresh, {of_warm:.2g} of a warm fill"
            measured = f"{speedup:,.0f} times; {fills}"
            if per_rank == 2 and ranks == 10_000:
                promised = "200 times Python's speed, or within 3 fills"
                met = speedup >= 200 or of_warm <= 3
                targets.append(Target(f"stage ids, {name}", promised, measured, met))
            if per_rank == 2 and ranks == 100_000:
                met = of_warm <= 3
                targets.append(Target(f"stage ids, {name}", "within 3 fills", measured, met))
    header = (
        "table",
        "native",
        "Python, per rank",
        "faster",
        "fill, fresh memory",
        "native / fresh",
        "fill, warm",
        "native / warm",
    )
    return measure.table(header, rows)


def partition_rows(targets: list[Target]) -> str:
    rows = []
    for stages in RANKS:
        layers = stages * LAYERS_PER_STAGE
        middle = stages // 2
        lists = fqn_lists(stages, layers)
        assert partition.generate_hf_model_fqn_per_model_part(stages, layers) == lists
        assert partition.generate_hf_model_fqn_of_stage(middle, stages, layers) == lists[middle]
        del lists
        times = take_turns(
            {
                "offsets": lambda n=stages, m=layers: partition.uniform_offsets(n, m),
                "lists": lambda n=stages, m=layers: hfpp.generate_hf_model_fqn_per_model_part(n, m),
                "one": lambda s=middle, n=stages, m=layers: (
                    partition.generate_hf_model_fqn_of_stage(s, n, m)
                ),
                "python": lambda n=stages, m=layers: fqn_lists(n, m),
            },
            budget=4.0,
        )
        offsets = ratio(times["python"], times["offsets"])
        lists_ratio = ratio(times["python"], times["lists"])
        one = ratio(times["lists"], times["one"])
        rows.append(
            (
                f"{stages:,} stages, {layers:,} layers",
                str(times["offsets"]),
                str(times["lists"]),
                str(times["one"]),
                str(times["python"]),
                f"{offsets:,.0f}x",
                f"{lists_ratio:.2g}x",
                f"{one:,.0f}x",
            )
        )
        if stages == 10_000:
            targets += [
                Target(
                    "partition offsets, 10,000 stages",
                    "500 times Python's lists",
                    f"{offsets:,.0f} times",
                    offsets >= 500,
                ),
                Target(
                    "module names of all stages",
                    "2 times Python's lists",
                    f"{lists_ratio:.2g} times",
                    lists_ratio >= 2,
                ),
                Target(
                    "module names of one stage of 10,000",
                    "1,000 times all of them",
                    f"{one:,.0f} times (of Python's: {one * lists_ratio:,.0f})",
                    one >= 1000,
                ),
            ]
    header = ("partition", "offsets", "all names", "one stage's names", "all names, Python")
    faster = ("offsets / Python", "all / Python", "one / all")
    return measure.table((*header, *faster), rows)


def shape_rows(targets: list[Target]) -> str:
    import torch

    def meta_tensors(stages: int):
        ids = (SIZES["microbatch_size"], SIZES["seq_len"])
        hidden, logits = (*ids, SIZES["hidden_size"]), (*ids, SIZES["vocab_size"])
        metas = []
        for stage in range(stages):
            entering = (ids, torch.int64) if stage == 0 else (hidden, torch.bfloat16)
            leaving = logits if stage == stages - 1 else hidden
            metas.append(
                (
                    torch.empty(entering[0], dtype=entering[1], device="meta"),
                    torch.empty(leaving, dtype=torch.bfloat16, device="meta"),
                )
            )
        return metas

    rows = []
    for stages in RANKS:
        tables = tensor_shapes.boundary_tables(stages, **SIZES)
        metas = meta_tensors(stages)
        for stage in (0, 1, stages // 2, stages - 1):
            assert tables.input_of(stage).shape == tuple(metas[stage][0].shape)
            assert tables.output_of(stage).shape == tuple(metas[stage][1].shape)
        del metas
        times = take_turns(
            {
                "native": lambda n=stages: tensor_shapes.boundary_tables(n, **SIZES),
                "meta": lambda n=stages: meta_tensors(n),
            },
            budget=4.0,
        )
        speedup = ratio(times["meta"], times["native"])
        rows.append(
            (f"{stages:,} stages", str(times["native"]), str(times["meta"]), f"{speedup:,.0f}x")
        )
        if stages == 10_000:
            promised, measured = "1,000 times meta tensors", f"{speedup:,.0f} times"
            what = "shape metadata, 10,000 stages"
            targets.append(Target(what, promised, measured, speedup >= 1000))
    return measure.table(("shape metadata", "native", "torch meta tensors", "faster"), rows)


def import_row(targets: list[Target]) -> str:
    def start(code: str) -> float:
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        return time.perf_counter() - begin

    bare, ours = [], []
    for _ in range(15):
        bare.append(start("pass"))
        ours.append(start("import hfpp"))
    times: list[Timing] = [measure.timing(values) for values in (bare, ours)]
    more = times[1].median - times[0].median
    promised = "under 100 ms over a bare interpreter"
    targets.append(Target("import hfpp", promised, seconds(more), more < 0.1))
    header = ("process", "time")
    return measure.table(header, [("python", str(times[0])), ("import hfpp", str(times[1]))])


def main() -> int:
    # From the first large block that is freed, glibc keeps memory of that size instead of giving it
    # back to the system each time, for tables and fills alike: as in any process that has worked.
    bytearray(1 << 24)
    targets: list[Target] = []
    groups = [
        ("Stage ids of the whole world", placement_rows(targets)),
        (f"Partition, {LAYERS_PER_STAGE} layers per stage", partition_rows(targets)),
        ("Shape metadata: " + ", ".join(f"{k} {v}" for k, v in SIZES.items()), shape_rows(targets)),
        ("Start of a process", import_row(targets)),
    ]
    sections = [
        "# The native core, measured",
        measure.provenance(["hfpp", "torch", "pybind11"]),
        NOTE,
        measure.targets_table(targets),
        *(f"## {title}\n\n{body}" for title, body in groups),
    ]
    return measure.report("core", "\n\n".join(sections), targets)


if __name__ == "__main__":
    sys.exit(main())

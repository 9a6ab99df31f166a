"""Importing hfpp is cheap and pulls in nothing heavy; planning works without torch at all."""

import subprocess
import sys
import time

import pytest

HEAVY = {"torch", "numpy", "transformers", "matplotlib", "rich"}


def run(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_by(statement: str) -> set[str]:
    """The heavy packages that a statement loads in a fresh interpreter."""
    return HEAVY & set(run(f"{statement}\nimport sys\nprint(*sys.modules)").split())


PLANNING = """
import hfpp
from hfpp.plan import partition, placement, tensor_shapes
from hfpp.plan.schedules import named
hfpp.stage_ids_this_rank(0, 4, 8)
hfpp.generate_hf_model_fqn_per_model_part(4, 32)
hfpp.calculate_virtual_stages(32, None, 4, True)
hfpp.functional._get_hidden_and_vocab_size(type("C", (), {"hidden_size": 1, "vocab_size": 2}))
try:
    hfpp.stage_ids_by_rank(4, 6)
except hfpp.PipelineConfigError:
    pass
"""


@pytest.mark.parametrize(
    "statement", ["import hfpp", "import hfpp.functional", "import hfpp.cli", PLANNING]
)
def test_planning_loads_nothing_heavy(statement):
    assert loaded_by(statement) == set()


def test_the_check_sees_what_is_loaded():
    assert "numpy" in loaded_by("import hfpp, numpy")
    assert "torch" in loaded_by("import hfpp; hfpp.Pipeline")


def test_planning_works_where_torch_cannot_be_imported():
    block = "import sys\nfor name in ('torch', 'numpy', 'transformers'): sys.modules[name] = None\n"
    assert run(block + PLANNING + "print(hfpp.ranks_by_stage(2, 4).row())") == "(0, 1, 0, 1)\n"


def test_import_takes_a_tenth_of_a_second_over_a_bare_interpreter():
    def seconds(code: str) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            run(code)
            times.append(time.perf_counter() - start)
        return min(times)

    assert seconds("import hfpp") - seconds("pass") < 0.1
    assert seconds("import time, hfpp; time.sleep(0.2)") - seconds("pass") > 0.1


def test_public_names_exist():
    import hfpp

    assert set(hfpp.__all__) <= set(dir(hfpp))
    for name in hfpp.__all__:
        assert getattr(hfpp, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        hfpp.no_such_name  # noqa: B018


def test_the_version_is_the_packages():
    from importlib.metadata import version

    import hfpp

    assert hfpp.__version__ == version("hfpp")

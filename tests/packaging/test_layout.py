import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).resolve().parents[1] / "tools" / "check_layout.py"


@pytest.fixture
def layout(tmp_path: Path) -> ModuleType:
    """The checker, looking at an empty tree."""
    spec = importlib.util.spec_from_file_location("check_layout", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.__dict__["ROOT"] = tmp_path
    return module


@pytest.mark.parametrize(
    ("name", "text", "finding"),
    [
        ("docs/index.md", "", "docs/index.md: docs is not one of the top-level entries"),
        ("edge/core/a.py", '"""A."""\nimport time\n', "edge/core/a.py:2: edge/core imports time, which it may not"),
        (
            "edge/core/b.py",
            '"""B."""\nfrom edge.kernel import maps\n',
            "edge/core/b.py:2: edge/core imports edge.kernel, which it may not",
        ),
        ("edge/core/c.py", '"""C."""\nfrom edge import abi\nfrom . import model\n', None),
        ("edge/d.py", "X = 1\n", "edge/d.py: no module docstring"),
        ("README.md", "see /wo" + "rk/x\n", "README.md:1: names the path '/wo" + "rk/'"),
        ("tests/test_e.py", "X = 1\n", None),
        (".gitignore", "", None),
    ],
)
def test_each_rule_is_held(layout: ModuleType, name: str, text: str, finding: str | None) -> None:
    path = layout.ROOT / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    assert list(layout.findings(Path(name))) == ([] if finding is None else [finding])


def test_a_kernel_source_without_licence_is_found(layout: ModuleType) -> None:
    path = layout.ROOT / "bpf" / "x.h"
    path.parent.mkdir()
    path.write_text("/* nothing */\n")
    assert list(layout.findings(Path("bpf/x.h"))) == [f"bpf/x.h: the first line is not `{layout.BPF_LICENCE}`"]

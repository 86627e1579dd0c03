"""The arrows of the design: who may import whom, read from the source."""

import ast
from pathlib import Path

SOURCE = Path("src/easyref")
FORBIDDEN = {
    "data": {"easyref.model", "easyref.training", "easyref.pipeline", "easyref.evaluation"},
    "model": {"easyref.data", "easyref.training", "easyref.pipeline", "easyref.evaluation"},
    "evaluation": {"easyref.training"},
    "pipeline": {"easyref.training"},
}
NEVER_AT_IMPORT = {"mlflow", "prefect", "dvc", "ray", "tensorrt"}


def imported(path: Path, top_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_only else list(ast.walk(tree))
    names = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
    return names | {n.module for n in nodes if isinstance(n, ast.ImportFrom) and n.module}


def test_arrows_point_one_way() -> None:
    for part, forbidden in FORBIDDEN.items():
        files = [SOURCE / f"{part}.py"] if (SOURCE / f"{part}.py").exists() else list((SOURCE / part).rglob("*.py"))
        assert files
        for file in files:
            for name in imported(file):
                assert not any(name == f or name.startswith(f + ".") for f in forbidden), f"{file} imports {name}"


def test_orchestration_packages_are_never_imported_at_import() -> None:
    for file in set(SOURCE.rglob("*.py")) - {SOURCE / "pyfunc.py"}:  # which MLflow runs, and nothing imports
        assert not any(name.startswith("easyref.pyfunc") for name in imported(file))
        found = {name.split(".")[0] for name in imported(file, top_only=True)} & NEVER_AT_IMPORT
        assert not found, f"{file} imports {found} at the top"

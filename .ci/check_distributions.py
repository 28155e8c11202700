"""Whether a wheel and an sdist hold what they are to hold: `check_distributions.py dist/`, in the repository."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path


# What an sdist needs besides the package, so that it can be tested where it is unpacked.
ROOTS = ("prm_hf", "tests", "recipes", "benchmarks", "research", "accelerate_configs", "docs", "examples")
FILES = ("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "constraints.txt", "constraints-lowest.txt")


def check(folder: Path) -> list[str]:
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout.splitlines()
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = set(archive.namelist())
    with tarfile.open(sdist) as archive:
        in_sdist = {name.partition("/")[2] for name in archive.getnames()}
    package = {name for name in tracked if name.startswith("prm_hf/")}
    expected = {name for name in tracked if name in FILES or name.partition("/")[0] in ROOTS}
    problems = [f"the wheel lacks {name}" for name in sorted(package | {"prm_hf/py.typed"}) if name not in in_wheel]
    problems += [f"the wheel has {x}" for x in sorted(in_wheel - package) if ".dist-info/" not in x]
    problems += [f"the sdist lacks {name}" for name in sorted(expected | {*FILES}) if name not in in_sdist]
    return problems


if __name__ == "__main__":
    found = check(Path(sys.argv[1]))
    sys.exit("\n".join(found) if found else 0)

"""Find or make a Python that has what requirement files name. Needs nothing but Python itself:

    python utils/environment.py FILE...                 prints the Python to use: .venv, or this one as it is,
                                                        or a .venv made for it
    python utils/environment.py --lowest FILE...        prints the requirements with their lowest versions
    python utils/environment.py --missing FILE...       a status that is not 0, and a line, if this Python lacks
                                                        something or cannot import it
"""

import importlib
import importlib.util
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
VENV = PROJECT / ".venv"
OLDEST = (3, 10)        # Python; this file is read by older ones
SAME = {"opencv-python": ("opencv-python-headless", "opencv-contrib-python", "opencv-contrib-python-headless")}
# Modules of the packages in requirements.txt: those that every command imports, and those imported where they are used.
MODULES = {"numpy": "numpy", "opencv-python": "cv2", "Pillow": "PIL", "tensorboardX": "tensorboardX", "tqdm": "tqdm",
           "torch": "torch"}
LATER = {"torchvision": "torchvision", "matplotlib": "matplotlib", "Jinja2": "jinja2", "tifffile": "tifffile"}
# What pip says, and what it comes down to.
CAUSES = (
    (r"No space left|Disk quota", "a full disk"),
    (r"Permission denied|Read-only", "a folder that cannot be written"),
    (r"new connection|name resolution|unreachable|timed out|ProxyError|ConnectionError|SSLError|Retrying",
     "no connection to the package index"),
    (r"No matching distribution|Requires-Python",
     f"no package for Python {sys.version_info[0]}.{sys.version_info[1]} here (3.10 to 3.13 were tested)"))


def requirements(files):
    """[(name, [(operator, version), ...])] of requirement files with one package a line."""
    lines = (line.split("#")[0].strip() for file in files for line in Path(file).read_text("utf-8").splitlines())
    return [(re.match(r"[\w.-]+", line)[0], re.findall(r"(>=|<|==)\s*([\w.]+)", line)) for line in lines if line]


def numbers(version):
    """"2.4.1+cu121" → (2, 4, 1). A vendor's early build, "2.5.0a0+x", counts as what it becomes."""
    return tuple(map(int, re.match(r"\d+(\.\d+)*", version)[0].split(".")))


def meets(version, operator, bound):
    found, bound = numbers(version), numbers(bound)
    width = max(len(found), len(bound))
    found, bound = (values + (0,) * (width - len(values)) for values in (found, bound))
    return {">=": found >= bound, "<": found < bound, "==": found == bound}[operator]


def installed(name):
    """The version of a package in this Python, under any of its names; None without it."""
    for other in (name, *SAME.get(name, ())):
        try:
            return metadata.version(other)
        except metadata.PackageNotFoundError:
            continue
    return None


def import_error(name):
    """Why the module of a package cannot be imported, in a line; None where it can, or is not ours."""
    try:
        if name in LATER and importlib.util.find_spec(LATER[name]) is None:
            return f"No module named {LATER[name]!r}"
        if name in MODULES:
            importlib.import_module(MODULES[name])
    except Exception as error:      # of many kinds, where libraries are missing or do not fit
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None


def remedy(name, reason):
    """What makes a package usable that fails for this reason."""
    if name == "opencv-python" and "No module named 'cv2'" not in reason:
        return ("pip uninstall opencv-python, then pip install opencv-python-headless, which needs no library of the "
                "system's; or, on Debian, apt install libgl1 libglib2.0-0")
    return f"{sys.executable} -m pip install -r {PROJECT / 'requirements.txt'}"


def check_packages(names=(*MODULES, *LATER)):
    """End this process with a sentence where a package of these is missing or cannot be loaded."""
    for name in names:
        reason = import_error(name)
        if reason:
            fail(f"the package {name}, ready to be imported", f"{reason}; {remedy(name, reason)}")


def missing(files):
    """What this Python lacks, as texts."""
    lacking = []
    if sys.version_info < OLDEST:
        lacking.append(f"Python>={OLDEST[0]}.{OLDEST[1]} (found {sys.version.split()[0]})")
    for name, bounds in requirements(files):
        version = installed(name)
        if version is None or not all(meets(version, *bound) for bound in bounds):
            wanted = name + ",".join("".join(bound) for bound in bounds)
            lacking.append(wanted + (f" (found {version})" if version else ""))
    return lacking


def fail(expected, found, said=""):
    print(f"error: expected {expected}, found {found}", said, sep="\n" * bool(said), file=sys.stderr)
    sys.exit(2)


def make(files, venv=VENV):
    """Make a virtual environment, or complete one, and fill it. Ends with a sentence where that fails."""
    python = venv / "bin/python"
    if venv.is_file():
        fail(f"{venv} to be a folder, or nothing there", "a file of that name")
    print(f"installing into {venv} (PyTorch is several GB; a few minutes)", file=sys.stderr)
    usable = f"import pip, sys; sys.exit(sys.version_info < {OLDEST})"
    whole = python.exists() and subprocess.run([python, "-c", usable], capture_output=True).returncode == 0
    if not whole:       # none, one too old, or only begun: Debian without python3-venv leaves a Python without pip
        made = subprocess.run([sys.executable, "-m", "venv", "--clear", venv], capture_output=True, text=True)
        if made.returncode:
            said = (made.stdout + made.stderr).strip()
            hint = " (Debian: apt install python3-venv)" if "ensurepip" in said else ""
            fail(f"{sys.executable} to make {venv}{hint}", cause(said) or "an error", said)
    words = [word for file in files for word in ("-r", file)]
    done = subprocess.run([python, "-m", "pip", "install", "--quiet", "--retries", "1", *words], stderr=subprocess.PIPE,
                          text=True)
    if done.returncode:
        fail(f"to install {', '.join(map(str, files))} into {venv}", cause(done.stderr) or "an error of pip",
             done.stderr.strip())
    if subprocess.run([python, __file__, "--missing", *files], stdout=subprocess.DEVNULL).returncode:
        sys.exit(2)     # it has said why
    return python


def cause(said):
    """What the words of pip or venv come down to; None if they are others."""
    return next((reason for pattern, reason in CAUSES if re.search(pattern, said)), None)


def choose(files):
    """The Python to use."""
    python = VENV / "bin/python"
    if python.exists() and subprocess.run([python, __file__, "--missing", *files], capture_output=True).returncode == 0:
        return python
    lacking = missing(files)
    if not lacking:
        check_packages()        # another environment would lack the same libraries of the system
        return sys.executable
    print(f"{sys.executable} lacks {', '.join(lacking)}", file=sys.stderr)
    return make(files)


def main(words):
    sys.path[0] = str(PROJECT)      # not utils/, whose modules have names that others have too
    if words[0] == "--lowest":
        print("\n".join(f"{name}=={bounds[0][1]}" for name, bounds in requirements(words[1:])))
    elif words[0] == "--missing":
        lacking = missing(words[1:])
        if not lacking:
            check_packages([name for name, _ in requirements(words[1:])])
        sys.exit(", ".join(lacking) or 0)
    else:
        print(choose(words))


if __name__ == "__main__":
    main(sys.argv[1:])

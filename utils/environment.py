"""Find or create a Python environment that meets requirement files. Needs only the standard library.

    python utils/environment.py FILE...                 prints the Python to use: that of .venv if it meets the
                                                        requirements, else this one if it does, else that of a .venv
                                                        created for this purpose
    python utils/environment.py --lowest FILE...        prints the requirements with their lowest versions
    python utils/environment.py --missing FILE...       exits with a nonzero status and one line if a package is missing
                                                        from this Python or cannot be imported
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
OLDEST = (3, 10)        # supported Python; this file must also run on older ones
ALTERNATIVES = {"opencv-python": ("opencv-python-headless", "opencv-contrib-python", "opencv-contrib-python-headless")}
# Modules of the packages in requirements.txt: those that every command imports, and those imported only where needed.
MODULES = {"numpy": "numpy", "opencv-python": "cv2", "Pillow": "PIL", "tensorboardX": "tensorboardX", "tqdm": "tqdm",
           "torch": "torch"}
LAZY_MODULES = {"torchvision": "torchvision", "matplotlib": "matplotlib", "Jinja2": "jinja2", "tifffile": "tifffile"}
# Patterns in the output of pip or venv, and the causes they stand for.
CAUSES = (
    (r"No space left|Disk quota", "a full disk"),
    (r"Permission denied|Read-only", "a folder that cannot be written"),
    (r"new connection|name resolution|unreachable|timed out|ProxyError|ConnectionError|SSLError|Retrying",
     "no connection to the package index"),
    (r"No matching distribution|Requires-Python",
     f"no package for Python {sys.version_info[0]}.{sys.version_info[1]} here (3.10 to 3.13 were tested)"))


def requirements(files):
    """[(name, [(operator, version), ...])] of requirement files with one package per line."""
    lines = (line.split("#")[0].strip() for file in files for line in Path(file).read_text("utf-8").splitlines())
    return [(re.match(r"[\w.-]+", line)[0], re.findall(r"(>=|<|==)\s*([\w.]+)", line)) for line in lines if line]


def numbers(version):
    """"2.4.1+cu121" → (2, 4, 1). A vendor's pre-release build such as "2.5.0a0+x" counts as that release."""
    return tuple(map(int, re.match(r"\d+(\.\d+)*", version)[0].split(".")))


def meets(version, operator, bound):
    """Whether a version meets a requirement such as ">=", "2.4"."""
    version, bound = numbers(version), numbers(bound)
    width = max(len(version), len(bound))
    version, bound = (values + (0,) * (width - len(values)) for values in (version, bound))
    return {">=": version >= bound, "<": version < bound, "==": version == bound}[operator]


def installed(name):
    """The version of a package, or of an alternative to it, in this Python; None if it is not installed."""
    for candidate in (name, *ALTERNATIVES.get(name, ())):
        try:
            return metadata.version(candidate)
        except metadata.PackageNotFoundError:
            continue
    return None


def import_error(name):
    """Why the module of a package cannot be imported, in one line; None if it can, or if we do not use the package."""
    try:
        if name in LAZY_MODULES and importlib.util.find_spec(LAZY_MODULES[name]) is None:
            return f"No module named {LAZY_MODULES[name]!r}"
        if name in MODULES:
            importlib.import_module(MODULES[name])
    except Exception as error:      # any kind, if libraries are missing or incompatible
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None


def remedy(name, reason):
    """How to fix a package that cannot be imported for this reason."""
    if name == "opencv-python" and "No module named 'cv2'" not in reason:
        return ("pip uninstall opencv-python, then pip install opencv-python-headless, which needs no system library; "
                "or, on Debian, apt install libgl1 libglib2.0-0")
    return f"{sys.executable} -m pip install -r {PROJECT / 'requirements.txt'}"


def check_packages(names=(*MODULES, *LAZY_MODULES)):
    """End this process with an error message if one of these packages is missing or cannot be imported."""
    for name in names:
        reason = import_error(name)
        if reason:
            fail(f"the package {name}, ready to be imported", f"{reason}; {remedy(name, reason)}")


def missing(files):
    """The requirements that this Python does not meet, as text."""
    lacking = []
    if sys.version_info < OLDEST:
        lacking.append(f"Python>={OLDEST[0]}.{OLDEST[1]} (found {sys.version.split()[0]})")
    for name, bounds in requirements(files):
        version = installed(name)
        if version is None or not all(meets(version, *bound) for bound in bounds):
            requirement = name + ",".join("".join(bound) for bound in bounds)
            lacking.append(requirement + (f" (found {version})" if version else ""))
    return lacking


def fail(expected, actual, output=""):
    """End this process with an error message, followed by the output of the command that failed."""
    print(f"error: expected {expected}, found {actual}", output, sep="\n" * bool(output), file=sys.stderr)
    sys.exit(2)


def make_venv(files, venv=VENV):
    """Create a virtual environment, or complete an existing one, and install the requirement files into it.

    Returns:
        Its Python. Ends this process with an error message if a step fails.
    """
    python = venv / "bin/python"
    if venv.is_file():
        fail(f"{venv} to be a folder, or nothing there", "a file of that name")
    print(f"installing into {venv} (PyTorch is several GB; this takes a few minutes)", file=sys.stderr)
    check = f"import pip, sys; sys.exit(sys.version_info < {OLDEST})"
    usable = python.exists() and subprocess.run([python, "-c", check], capture_output=True).returncode == 0
    if not usable:      # absent, too old, or incomplete: Debian without python3-venv leaves a Python without pip
        created = subprocess.run([sys.executable, "-m", "venv", "--clear", venv], capture_output=True, text=True)
        if created.returncode:
            output = (created.stdout + created.stderr).strip()
            hint = " (Debian: apt install python3-venv)" if "ensurepip" in output else ""
            fail(f"{sys.executable} to create {venv}{hint}", cause(output) or "an error", output)
    arguments = [argument for file in files for argument in ("-r", file)]
    pip = subprocess.run([python, "-m", "pip", "install", "--quiet", "--retries", "1", *arguments],
                         stderr=subprocess.PIPE, text=True)
    if pip.returncode:
        fail(f"to install {', '.join(map(str, files))} into {venv}", cause(pip.stderr) or "an error of pip",
             pip.stderr.strip())
    if subprocess.run([python, __file__, "--missing", *files], stdout=subprocess.DEVNULL).returncode:
        sys.exit(2)     # it has printed the reason
    return python


def cause(output):
    """The cause of a failure, from the output of pip or venv; None if it is unknown."""
    return next((reason for pattern, reason in CAUSES if re.search(pattern, output)), None)


def choose_python(files):
    """The Python to use: that of .venv, this one, or that of a new .venv; see the top of this file."""
    python = VENV / "bin/python"
    if python.exists() and subprocess.run([python, __file__, "--missing", *files], capture_output=True).returncode == 0:
        return python
    lacking = missing(files)
    if not lacking:
        check_packages()        # a new environment would lack the same system libraries
        return sys.executable
    print(f"{sys.executable} lacks {', '.join(lacking)}", file=sys.stderr)
    return make_venv(files)


def main(arguments):
    sys.path[0] = str(PROJECT)      # not utils/, whose module names would hide those of installed packages
    if arguments[0] == "--lowest":
        print("\n".join(f"{name}=={bounds[0][1]}" for name, bounds in requirements(arguments[1:])))
    elif arguments[0] == "--missing":
        lacking = missing(arguments[1:])
        if not lacking:
            check_packages([name for name, _ in requirements(arguments[1:])])
        sys.exit(", ".join(lacking) or 0)
    else:
        print(choose_python(arguments))


if __name__ == "__main__":
    main(sys.argv[1:])

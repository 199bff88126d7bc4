"""Networks on the Hugging Face Hub, by names such as hf:owner/name or hf:owner/name@revision."""

import contextlib
import json
import re
from pathlib import Path

from utils.common.errors import UserError, first_line

from .card import CARD, CONFIG, is_from_export

NAME = re.compile(r"hf:([\w-][\w.-]*/[\w-][\w.-]*)(?:@([^\s@]+))?")
WEIGHTS = "model.safetensors"       # as `push` names the file
FILES = (WEIGHTS, CONFIG, CARD)
LOGIN = "hf auth login, or the variable HF_TOKEN"


def place_of(name):
    """The path that results of a file of weights are named after: for a name of the Hub, a file in snapshots/ here."""
    text = str(name)
    return Path("snapshots", f"{text[3:].replace('/', '--')}.safetensors") if text.startswith("hf:") else Path(text)


def fetch(name):
    """Download a network that `push` uploaded, unless it is in the Hub's cache.

    Returns the path of its .safetensors file in the cache, with config.json beside it; a path in place of a name is
    returned as it is. Raises `UserError` if the network cannot be downloaded, or is another project's.
    """
    if not str(name).startswith("hf:"):
        return name
    with _connection(name) as (hub, repository, revision):
        config = Path(hub.hf_hub_download(repository, CONFIG, revision=revision))
        file = json.loads(config.read_text(encoding="utf-8")).get("file") if is_from_export(config) else None
        if not isinstance(file, str) or not re.fullmatch(r"[\w-][\w.-]*\.safetensors", file):
            raise UserError(f"{name}: expected a network of evaluate.py --push, found a {CONFIG} of something else")
        return Path(hub.hf_hub_download(repository, file, revision=config.parent.name))     # of the same commit


def push(name, folder, overwrite):
    """Upload the files of an export in one commit. A new repository is private.

    name: hf:owner/name; folder: with `FILES`, or None only to check whether they may be uploaded; overwrite: whether to
    replace such files, and to publish in a public repository. Returns who can see the repository, and its address;
    `UserError` if the Hub refuses the files.
    """
    with _connection(name, "--push ") as (hub, repository, revision):
        if revision or hub.get_token() is None:
            raise UserError(f"--push {name}: expected {'no revision' if revision else 'a token that may write'}, found "
                            f"{revision or 'none'}{f'; {LOGIN}' * (not revision)}")
        api = hub.HfApi()
        if not api.repo_exists(repository):
            if folder is None:
                return
            api.create_repo(repository, private=True)
        info = api.model_info(repository)
        if not info.private and not overwrite:
            raise UserError(f"--push {name}: expected a private repository (or --overwrite, which publishes the "
                            "network and replaces such files), found a public one")
        existing = [file.rfilename for file in info.siblings if file.rfilename in FILES]
        if existing and not overwrite:
            raise UserError(f"--push {name}: expected a repository without these files (or --overwrite; its history "
                            f"keeps them), found {', '.join(existing)}")
        if folder is not None:      # parent_commit: the Hub refuses the files if there is a later commit by now
            api.create_commit(repository, [hub.CommitOperationAdd(file, Path(folder, file)) for file in FILES],
                              commit_message="Upload a network by evaluate.py --push", parent_commit=info.sha)
        return f"{'private' if info.private else 'public'} at {api.endpoint}/{repository}"


@contextlib.contextmanager
def _connection(name, flag=""):
    """Context that yields (huggingface_hub, owner/name, revision or None), and turns its errors into `UserError`."""
    if (match := NAME.fullmatch(str(name))) is None:
        raise UserError(f"{flag}{name}: expected hf:owner/name or hf:owner/name@revision, found another form")
    try:
        import huggingface_hub as hub
    except ImportError:
        raise UserError(f"{flag}{name}: expected the package huggingface_hub, found none; pip install huggingface_hub"
                        ) from None
    try:
        yield hub, *match.groups()
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001, the client, its network libraries and the disk raise many types
        status = getattr(getattr(error.__cause__ or error, "response", None), "status_code", None)
        kinds, endpoint = hub.utils, hub.HfApi().endpoint
        if isinstance(error, kinds.RepositoryNotFoundError) or status in (401, 403):    # also of a private one
            problem = f"expected a repository that your token may use, found none, or no permission ({status}); {LOGIN}"
        elif isinstance(error, kinds.RevisionNotFoundError):
            problem = f"expected a branch, tag or commit of the repository, found no {match[2]}"
        elif isinstance(error, kinds.LocalEntryNotFoundError):
            problem = f"expected a connection to {endpoint}, or the files in its cache, found neither"
        elif isinstance(error, kinds.EntryNotFoundError):
            problem = f"expected {CONFIG} and the weights that it names, as --push writes them, found not both"
        else:
            problem = f"expected an answer of {endpoint}, found: {first_line(error)}"
        raise UserError(f"{flag}{name}: {problem}") from None

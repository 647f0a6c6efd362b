"""A folder to the Hugging Face hub."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import huggingface_hub as hub

from unislu_llm.errors import UserError


def check_login(name: str) -> None:
    """Whether somebody is logged in who could publish under a name; asks the hub. Raises UserError:
    nobody is, the token is refused, the hub cannot be reached, or it is no name."""
    with _told(name):
        if name.count("/") != 1:
            raise UserError(f"--push {name}: give user/model, or organisation/model")
        hub.utils.validate_repo_id(name)
        hub.HfApi().whoami()


def publish(folder: Path, name: str, files: Sequence[str], *, private: bool = False,
            branch: str = "") -> str:
    """Upload a folder's `files` (patterns), and give the address of the commit; the repository is
    made where there is none. Raises UserError: no right to write there, no hub, or a `private` one
    is public already."""
    api = hub.HfApi()
    with _told(name, f". {folder} is written: once that is mended, `hf upload {name} {folder}`"):
        # Not `False`: an organisation may have it that everything is private.
        api.create_repo(name, private=private or None, exist_ok=True)
        # It says nothing of a repository that was there, and was not made private by this.
        if private and not api.model_info(name).private:
            raise UserError(f"--push {name} --private: the repository is there and public; make "
                            "it private in its settings, or take another name")
        if branch:
            api.create_branch(name, branch=branch, exist_ok=True)
        return str(api.upload_folder(
            repo_id=name, folder_path=folder, allow_patterns=list(files), revision=branch or None,
            commit_message="Upload a model of unislu_llm").commit_url)


@contextlib.contextmanager
def _told(name: str, more: str = "") -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except hub.errors.LocalTokenNotFoundError:
        why = "nobody is logged in; `hf auth login`, or set HF_TOKEN to a token that may write"
    except hub.errors.HFValidationError as error:
        why = f"is no name on the hub ({error})"
    except Exception as error:  # the class of a network error differs by release of the client
        status = getattr(getattr(error, "response", None), "status_code", None)
        why = {401: "the hub does not know this token (HF_TOKEN, or that of `hf auth login`); log "
                    "in again with one that may write",
               403: "this token may not write there; take one that may, or a name of your own",
               }.get(status or 0, f"{type(error).__name__}: "
                                  f"{(str(error).splitlines() or ['no message'])[0]}")
    else:
        return
    raise UserError(f"--push {name}: {why}{more}")

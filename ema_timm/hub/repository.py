"""One repository of the Hub: list its files, make one commit, download that commit.

Only the commit changes what readers see, so the repository has all of it or nothing. The commit
names its parent, so the Hub refuses it if somebody else has committed meanwhile. Its description
holds a hash of all files, by which a commit whose response was lost is found instead of made twice.
"""

import functools
import sys
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

from ema_timm import __version__
from ema_timm.errors import UserError
from ema_timm.hub.commit import Destination, File, Landed, digest
from ema_timm.hub.steps import AGAIN, ATTEMPTS, StepError, Steps
from ema_timm.hub.time_limit import TimeLimit

ANSWER_SECONDS = 90
"""Time limit of a step of small requests; the client itself retries for up to half a minute."""


class Repository:
    """One repository. Every step has a time limit, retries and one-line errors."""

    def __init__(self, api: HfApi, destination: Destination, limit: TimeLimit):
        self.api, self.to, self.limit = api, destination, limit
        self.head: str | None = None
        self._steps = Steps(destination.repo, limit, api.token)
        self._branch = {"revision": destination.revision, "create_pr": destination.create_pr}

    def open(self) -> None:
        """Find or create the repository and its branch, and store its head.

        Raises:
            UserError: If it must be private but is public.
        """
        self.head = self._steps.with_retries(self._open)

    def _open(self) -> str:
        with self._steps.step("reading the repository", seconds=ANSWER_SECONDS):
            try:
                about = self.api.repo_info(self.to.repo)
            except RepositoryNotFoundError:
                self.api.create_repo(self.to.repo, private=self.to.private or None, exist_ok=True)
                about = self.api.repo_info(self.to.repo)
            if self.to.private and not about.private:
                raise UserError(
                    f"{self.to.repo} exists and is public, and --private is for a new repository. "
                    f"Make it private at {self.api.endpoint}/{self.to.repo}/settings, or leave "
                    "out --private."
                )
            return self._head_of_branch(about.sha)

    def _head_of_branch(self, main: str) -> str:
        if self.to.revision == "main":
            return main
        try:
            return self.api.repo_info(self.to.repo, revision=self.to.revision).sha
        except RevisionNotFoundError:
            self.api.create_branch(self.to.repo, branch=self.to.revision, exist_ok=True)
            return self.api.repo_info(self.to.repo, revision=self.to.revision).sha

    def contents(self) -> dict[str, str]:
        """Hash of every file at the head by its name: sha256 of large files, git's of others."""
        return self._steps.with_retries(self._contents)

    def _contents(self) -> dict[str, str]:
        with self._steps.step("listing its files", seconds=ANSWER_SECONDS):
            tree = self.api.list_repo_tree(self.to.repo, revision=self.head, recursive=True)
            files = [entry for entry in tree if hasattr(entry, "blob_id")]
        return {file.path: file.lfs.sha256 if file.lfs else file.blob_id for file in files}

    def push(self, files: list[File], title: str) -> Landed:
        """Upload the files and make the commit, once.

        Raises:
            StepError: If it failed. The repository is unchanged, unless the message says that this
                is not known.
        """
        found = self._find(files) if self.to.create_pr else None
        if found:
            return found
        operations = [CommitOperationAdd(file.name, file.path) for file in files]
        for file, operation in zip(files, operations, strict=True):
            self._upload(file, operation)
        mark = f"ema-timm {__version__}, files {digest(files)}"
        commit = functools.partial(self._commit, operations, title, mark)
        look = functools.partial(self._look_after, files)
        # A pull request has no parent that would refuse a second one.
        return self._steps.with_retries(commit, 1 if self.to.create_pr else ATTEMPTS, look)

    def _upload(self, file: File, operation: CommitOperationAdd) -> None:
        """Upload a large file; a small one is part of the commit.

        One at a time: the client uploads several in threads, which the timer cannot interrupt.
        """
        try:
            with self._steps.step(f"uploading {file.name}"):
                self.api.preupload_lfs_files(self.to.repo, [operation], **self._branch)
        except StepError:
            print(file=sys.stderr)  # the client's progress bar ends without a newline
            raise

    def _commit(self, operations: list[CommitOperationAdd], title: str, mark: str) -> Landed:
        with self._steps.step("committing", seconds=ANSWER_SECONDS):
            made = self.api.create_commit(
                self.to.repo,
                operations,
                commit_message=title,
                commit_description=mark,
                parent_commit=None if self.to.create_pr else self.head,
                **self._branch,
            )
        return Landed(made.oid, made.pr_url or made.commit_url, new=True)

    def _look_after(self, files: list[File], failure: StepError) -> Landed | None:
        try:
            found = self._find(files)
        except StepError as error:
            raise StepError(
                f"{failure.what}, and {error.what}: whether the commit has landed is not known",
                AGAIN,
            ) from error
        if found:
            print(f"{failure.what}, but the commit has landed", file=sys.stderr)
        return found

    def _find(self, files: list[File]) -> Landed | None:
        """The commit of exactly these files since the head was read, if there is one."""
        return self._steps.with_retries(functools.partial(self._find_mark, digest(files)))

    def _find_mark(self, mark: str) -> Landed | None:
        with self._steps.step("looking for the commit", seconds=ANSWER_SECONDS):
            if not self.to.create_pr:
                return self._find_on(self.to.revision, mark, url=None)
            for request in self.api.get_repo_discussions(
                self.to.repo, discussion_type="pull_request", discussion_status="open"
            ):
                found = self._find_on(f"refs/pr/{request.num}", mark, request.url)
                if found:
                    return found
        return None

    def _find_on(self, revision: str, mark: str, url: str | None) -> Landed | None:
        for commit in self.api.list_repo_commits(self.to.repo, revision=revision):
            if commit.commit_id == self.head:
                return None
            if mark in commit.message:
                return Landed(commit.commit_id, url or self.url(commit.commit_id), new=False)
        return None

    def fetch(self, file: str, commit: str, cache: Path, again: bool = False) -> Path:
        """Download one file of a commit into ``cache``; with ``again`` even if it is there."""
        return self._steps.with_retries(
            functools.partial(self._download, file, commit, cache, again)
        )

    def _download(self, file: str, commit: str, cache: Path, again: bool) -> Path:
        with self._steps.step(f"fetching {file} back"):
            return Path(
                self.api.hf_hub_download(
                    self.to.repo, file, revision=commit, cache_dir=cache, force_download=again
                )
            )

    def url(self, commit: str) -> str:
        """Page of a commit."""
        return f"{self.api.endpoint}/{self.to.repo}/commit/{commit}"

"""A hook of MkDocs: add what the pages of docs/ link to, and the reference of the public names, to the site.

The pages of docs/ also have to work on GitHub. Therefore they link to recipes, pictures and other files outside docs/
by relative paths. On the site, such a file is a page of its own under ``repository/``, and the links lead to it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"(?<=\]\()([^)#\s]+)(?=[)#])")
ROW = re.compile(r"^\| `(\w+)` \|", re.MULTILINE)
MODULE = re.compile(r"^Import these names from `([\w.]+)`", re.MULTILINE)
LANGUAGES = {".yaml": "yaml", ".py": "python", ".jsonl": "json", ".json": "json", ".txt": "text"}
# Callbacks override methods that only this package calls. The base class documents them.
WITH_MEMBERS = "kedit_train.EditCallback"


def repository_path(src_uri: str) -> str:
    """Return the path in the repository of a file of the site."""
    if not src_uri.startswith("repository/"):
        return f"docs/{src_uri}"
    path = src_uri.removeprefix("repository/")
    return path if (ROOT / path).exists() else path.removesuffix(".md")


def site_path(path: str) -> str:
    """Return where a file of the repository is on the site. Text files become Markdown pages."""
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    return f"repository/{path}.md" if Path(path).suffix in LANGUAGES else f"repository/{path}"


def linked(path: str, link: str) -> str | None:
    """Return the path in the repository to which a link on the page ``path`` leads, or None for other links."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
    return target if "://" not in link and (ROOT / target).is_file() else None


def repository_file(path: str, config: MkDocsConfig) -> File:
    """Return a file of the repository as a file of the site."""
    place, source = site_path(path), ROOT / path
    if source.suffix not in LANGUAGES and source.suffix != ".md":
        return File.generated(config, place, abs_src_path=str(source))
    text = source.read_text(encoding="utf-8")
    if source.suffix != ".md":
        header = f"---\nsearch:\n  exclude: true\n---\n# {path}\n\n"
        text = f"{header}`````{LANGUAGES[source.suffix]}\n{text.rstrip()}\n`````\n"
    return File.generated(config, place, content=text, inclusion=InclusionLevel.NOT_IN_NAV)


def reference_pages() -> dict[str, tuple[str, list[str]]]:
    """Return the place, the title and the full names of each section of docs/api.md."""
    pages = {}
    for section in (ROOT / "docs" / "api.md").read_text(encoding="utf-8").split("\n## ")[1:]:
        title = section.partition("\n")[0]
        module = MODULE.search(section)
        place = re.sub(r"\W+", "_", title.lower())
        names = [f"{module[1] if module else 'kedit_train'}.{name}" for name in ROW.findall(section)]
        pages[f"reference/{place}.md"] = (title, names)
    return pages


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the pages of the reference to the navigation."""
    (reference,) = [entry["Reference"] for entry in config.nav if "Reference" in entry]
    reference += [{title: place} for place, (title, _) in reference_pages().items()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside docs/ to which a page of the site leads, and the pages of the reference."""
    queue = [repository_path(file.src_uri) for file in files.documentation_pages()]
    for path in queue:
        for link in LINK.findall((ROOT / path).read_text(encoding="utf-8")):
            target = linked(path, link)
            if target and files.get_file_from_path(site_path(target)) is None:
                files.append(repository_file(target, config))
                queue += [target] if target.endswith(".md") else []
    for place, (title, names) in reference_pages().items():
        options = "\n    options: {members: false}" if "callbacks" in title.lower() else ""
        entries = [f"::: {name}{'' if name == WITH_MEMBERS else options}\n" for name in names]
        files.append(File.generated(config, place, content="\n".join([f"# {title}\n", *entries])))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Let links to files outside docs/ lead to their pages, and link the public names to their reference."""
    path = repository_path(page.file.src_uri)
    folder = posixpath.dirname(page.file.src_uri)

    def to_site(match: re.Match[str]) -> str:
        target = linked(path, match[0])
        return posixpath.relpath(site_path(target), folder or ".") if target else match[0]

    if page.file.src_uri == "api.md":
        names = iter([name for _, names in reference_pages().values() for name in names])
        return ROW.sub(lambda match: f"| [`{match[1]}`][{next(names)}] |", markdown)
    return markdown if page.file.src_uri.startswith("reference/") else LINK.sub(to_site, markdown)

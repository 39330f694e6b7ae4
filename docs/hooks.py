"""Hooks of MkDocs (mkdocs.yml): pages of the site that are not files of this folder.

The front page is the README. A file or folder of the repository that a page links to is shown on a
page of its own, so that the site has no link that leads nowhere, wherever it is served.
"""

import json
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)(#[^)\s]*)?\)")
FRONT_PAGE = "index.md"


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Adds the front page, and pages for what lies outside of docs/ and is linked to."""
    files.append(File.generated(config, FRONT_PAGE, content=front_page()))
    for file in list(files.documentation_pages()):
        for target in LINK.findall(file.content_string):
            path = outside(file.src_uri, target[0])
            uri = path and shown_at(path)
            if uri and not files.get_file_from_path(uri):
                files.append(File.generated(config, uri, content=shown(path)))
    return files


def on_page_markdown(markdown: str, /, *, page: Page, **_: object) -> str:
    """Leads links out of docs/ to the pages that show what is there."""

    def led(match: re.Match[str]) -> str:
        path = outside(page.file.src_uri, match[1])
        if path is None:
            return match[0]
        return f"]({'../' * page.file.src_uri.count('/')}{shown_at(path)})"

    return LINK.sub(led, markdown)


def front_page() -> str:
    """The README, seen from docs/: its links, and the Markdown inside of its HTML."""
    text = (ROOT / "README.md").read_text()
    text = LINK.sub(
        lambda link: f"]({'../' + link[1]}{link[2] or ''})".replace("(../docs/", "("), text
    )
    text = re.sub("<(table|tr)>", r'<\1 markdown="block">', text)
    return re.sub("<td>", '<td markdown="block">', text)


def outside(page: str, target: str) -> Path | None:
    """What a link of a page means, below the root, if that is outside of docs/."""
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
    return Path(path.removeprefix("../")) if path.startswith("../") else None


def shown_at(path: Path) -> str:
    """The page that shows a file or folder of the repository."""
    return f"source/{path}.md"


def shown(path: Path) -> str:
    """A page with a file, or with each file of a folder. Raises FileNotFoundError."""
    place = ROOT / path
    if not place.exists():
        raise FileNotFoundError(f"a page links to {path}, which does not exist")
    files = sorted(place.iterdir()) if place.is_dir() else [place]
    title = f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n"
    return title + "\n\n".join(
        (f"## {file.name}\n\n" if place.is_dir() else "") + code(file)
        for file in files
        if file.is_file()
    )


def code(file: Path) -> str:
    """A file as a block of code; a notebook as its cells."""
    if file.suffix != ".ipynb":
        return f"````{file.suffix[1:]}\n{file.read_text()}\n````"
    cells = json.loads(file.read_text())["cells"]
    return "\n\n".join(
        f"````python\n{''.join(cell['source'])}\n````"
        if cell["cell_type"] == "code"
        else "".join(cell["source"])
        for cell in cells
    )

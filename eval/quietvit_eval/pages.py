"""Pages that people read: one HTML file each, all of one look, that need nothing else."""

from __future__ import annotations

from typing import Any


def fill_page(template: str, /, **contents: Any) -> str:
    """HTML of the template `templates/<template>.html`, filled with `contents`.

    All templates extend base.html, which has the head, the colours by light and by dark, and the look of what pages
    share. Text is escaped; what a template uses and `contents` does not have is an error of jinja2.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    pages = Environment(
        loader=PackageLoader("quietvit_eval", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return pages.get_template(f"{template}.html").render(**contents)

"""Pages: one HTML file with everything inside, no script, no network."""

from pathlib import Path
from typing import Any

import jinja2


def page(template: str, **values: Any) -> str:
    """A page from a template of the package, such as "report/page.html.j2"; all of them extend `page.html.j2`.

    Values are escaped; one that a template names and that is missing is an error.
    """
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, loader=jinja2.FileSystemLoader(Path(__file__).parent)
    )
    environment.filters["zip"] = zip
    return environment.get_template(template).render(**values)

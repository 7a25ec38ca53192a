"""The templates of this user, for readers. These functions read files and block for some milliseconds."""

from __future__ import annotations

from utilityvm.machine.names import check_text
from utilityvm.machine.oserrors import typed
from utilityvm.templates import catalog
from utilityvm.templates.catalog import Template


@typed
def list_templates() -> list[Template]:
    """Every whole template, in the order of names. Damaged ones are left out, with a warning in the log."""
    return catalog.every()


@typed
def get_template(name: str) -> Template:
    """The template of that name.

    Raises:
        TemplateNotFound: there is none; names those that there are.
        TemplateDamaged: its manifest cannot be read.
        InvalidRequest: no template can have that name.
    """
    check_text("template", name)
    return catalog.load(name)

"""Makes the docstrings of the package readable to mkdocstrings: they are written in the style of Hugging Face's."""

import re

from griffe import Extension, Parameter, ParameterKind, Parameters


class Docstrings(Extension):
    def on_package(self, *, pkg, **kwargs) -> None:
        spell_out_hyperparameters(pkg)
        simplify(pkg, set())


def spell_out_hyperparameters(package) -> None:
    """The signature of `PRM` names each hyperparameter, with its default, in place of `**hyperparameters`."""
    given = package["optim.prm.PRM.__init__"]
    defaults = package["optim.hyperparameters.Hyperparameters"].attributes
    named = [p for p in given.parameters if p.name in ("self", "params", "lr", "betas")]
    for parameter in named:
        if parameter.name in defaults:
            parameter.default = defaults[parameter.name].value
    documented = [name for name, x in defaults.items() if x.annotation is not None and name not in ("lr", "betas")]
    given.parameters = Parameters(
        *named,
        *(
            Parameter(name, kind=ParameterKind.keyword_only, annotation=x.annotation, default=x.value)
            for name, x in defaults.items()
            if name in documented
        ),
    )


def simplify(item, seen: set[str]) -> None:
    """Types stand in the signature, so `name (`type`, *optional*):` becomes `name:`, and [`~a.B`] becomes `B`."""
    if item.is_alias or item.path in seen:
        return
    seen.add(item.path)
    if item.docstring:
        text = re.sub(r"Example:(?=\n\s*>>>)", "Examples:", item.docstring.value)
        text = re.sub(r"\[`~?(?:[\w.]+\.)?(\w+)`\](?!\()", r"`\1`", text)
        item.docstring.value = re.sub(r"^( {2,}\*{0,2}\w+) \(.*\):", r"\1:", text, flags=re.MULTILINE)
    for member in list(item.members.values()):
        simplify(member, seen)

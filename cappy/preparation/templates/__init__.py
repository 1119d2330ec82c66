"""PromptSource templates, read from their YAML files."""

from cappy.preparation.templates.loading import Template, load_templates

__all__ = ["Template", "load_templates"]

"""What can be wrong with an exported graph: each kind of difference has its own error."""


class ExportError(ValueError):
    """A model that cannot be exported, or a graph that is not the model."""


class NameMismatchError(ExportError):
    """The graph's inputs or outputs have other names than the contract's."""


class AxisMismatchError(ExportError):
    """An axis that must be dynamic is fixed, or the other way round."""


class TypeMismatchError(ExportError):
    """An input or output has another element type than the contract's."""


class ValueMismatchError(ExportError):
    """The graph's scores differ from the model's."""

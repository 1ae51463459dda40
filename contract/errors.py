"""The errors of the contract. Every message says what was found and what was expected."""


class ContractError(ValueError):
    """Something that training and serving agreed on does not hold."""


class RecordError(ContractError):
    """Bytes that are not a history: a broken length, or an item id outside 1 .. 2^63-1."""


class HistoryLogError(ContractError):
    """A folder that is not a readable history log, or one of another format version."""


class BundleError(ContractError):
    """A bundle that must not be served: missing, half-written, altered, or of another version."""

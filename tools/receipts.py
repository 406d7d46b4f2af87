"""The receipts of this workspace; what they are, :mod:`drivetrain_cli.claims.receipts` says."""

from __future__ import annotations

from drivetrain_cli.claims.receipts import Receipt, ReceiptError, files, load, read, without_receipt

from tools import workspace

__all__ = ["Receipt", "ReceiptError", "check", "files", "load", "read", "without_receipt"]


def check() -> None:
    """See to it that every figure of the documentation can be measured again.

    Raises:
        ReceiptError: a receipt is malformed, or figures have none.
    """
    root = workspace.ROOT
    load(root)
    if missing := [place for file in files(root) for place in without_receipt(file, root)]:
        raise ReceiptError("; ".join(missing))

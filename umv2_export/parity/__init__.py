"""Compare a runtime with the reference, tell near ties from errors, and find the first layer that differs."""

from umv2_export.parity.cases import Case, parity_cases
from umv2_export.parity.compare import Check, Tolerance
from umv2_export.parity.report import ParityReport
from umv2_export.parity.run import check_bundle, check_parity

__all__ = ["Case", "Check", "ParityReport", "Tolerance", "check_bundle", "check_parity", "parity_cases"]

"""The PyTorch model: the literal reference, and the same model after the folds of the export."""

from umv2_export.model.transformer import LanguageModel, ModelOutput, reference_model

__all__ = ["LanguageModel", "ModelOutput", "reference_model"]

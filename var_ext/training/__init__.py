"""Trainers of the tokenizer and the transformer: `train_tokenizer`, `train_var` and their recipes."""

from var_ext.training.recipes import Recipe, TokenizerRecipe, VARRecipe
from var_ext.training.stored_tokens import store_tokens
from var_ext.training.tokenizer import train_tokenizer
from var_ext.training.var import train_var

__all__ = ["Recipe", "TokenizerRecipe", "VARRecipe", "store_tokens", "train_tokenizer", "train_var"]

"""The EasyRef model: reference encoder, decoupled attention, LoRA, adapter, weights.

Import the submodules (`from easyref.model.reference import ReferenceEncoder`): this package pulls in no library by itself.
"""

"""Text, tokens and batches. Nothing here imports a model, and torch only where tensors are made."""

from moesaic.data.corpora import Corpus, DataOptions, Document, open_corpus
from moesaic.data.pretrain import prepare
from moesaic.data.store import TokenStore
from moesaic.data.tokenizers import StreamDecoder, Tokenizer

__all__ = [
    "Corpus",
    "DataOptions",
    "Document",
    "StreamDecoder",
    "TokenStore",
    "Tokenizer",
    "open_corpus",
    "prepare",
]

"""Text from a model: continuations of prompts, and conversations.

The modules in reading order:

1. sampling.py: the options of a generation, without PyTorch. prompts.py and results.py read and write files.
2. model_loading.py opens a Hugging Face folder or a checkpoint.
3. backend.py: the interface of a model that computes the next token of several sequences. Two implementations:
   library_backend.py calls transformers, decoder_backend.py our own model with the cache of key_value_cache.py.
   cache_check.py finds out whether the cache of a type is exact.
4. token_choice.py chooses tokens with the logits processors of transformers. text_stream.py turns tokens into text as
   they appear, and finds stop strings.
5. text_generator.py: the loop over the tokens of a batch, and over batches.
6. chat.py: a conversation with the chat template of a model. terminal.py: prompts and conversations on a terminal.
7. measure.py: the measurements of tools/benchmark_generate.py.
"""

"""Conversations as training data: the model's chat template, its tokens, and a loss mask on the assistant's words.

The path of a record through this package, which is the order in which to read it:

1. messages.py: any common format of chat data (OpenAI, ShareGPT, Alpaca) -> a ``Conversation`` (conversation.py).
   training_marks.py handles turns that are marked as not for training, tool_calls.py unpacks tool calls and schemas.
2. template_files.py: which chat template a tokenizer folder uses. template.py renders it, with transformers'
   own function; render_limits.py bounds its time, memory and output: a template is a program from a downloaded folder.
3. dropped_content.py: what the template left out is refused where it must not be missing, and counted elsewhere.
4. turns.py: where the assistant's turns are in the rendered text.
5. encoder.py: does all of this for one record, and makes ids and mask (``EncodedChat``).

The ids are those of transformers' ``apply_chat_template`` on the same messages. The mask is 1 on the tokens that the
assistant has to predict: its words, up to and including the token that ends its turn. It is 0 on everything else,
including headers and the generation prompt. A token that is only partly in a turn belongs to it. If a template marks
the turns itself ({% generation %}), the mask is that of ``return_assistant_tokens_mask``.

The end-of-document token after a conversation has mask 0: the end of the turn already says that the assistant is done.
If the template ends with that token, it is not written twice and keeps the mask of the turn.

What no model should learn is refused, not repaired: contents with control tokens (they would forge turns), contents
that the template leaves out, and turns that cannot be found with certainty.
"""

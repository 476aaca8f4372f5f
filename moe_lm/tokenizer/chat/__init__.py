"""Conversations as a model reads them, with their loss mask, under the chat template of any model.

A template is a Jinja program from somebody else. It may strip, join and wrap what the messages say, and its output does
not tell which characters came from where. Two questions depend on that: which `<|end|>` is a special token and which is
text that somebody typed, and which characters the assistant has to learn to write.

So each string that goes into the template carries an author for each of its characters, and Jinja is taught to keep
them. When a user says " <|end|> ", the assistant says "Yes", and the template strips both, this comes out:

    text     [user]<|end|><|end|>[assistant]Yes<|end|>
    authors  ......0000000..................111.......    the message that wrote each character, . for the template
    trained                                 ^^^^^^^^^^    the answer, and the token with which the template ends it

The first `<|end|>` was typed by the user and stays text. Where a turn begins and ends is found by rendering shorter
conversations with the same template.

All of this is behind `ChatFormat.render(messages, tools) -> text, authors, trained, specials` in turns.py.
Reading order: turns.py, template.py, then traced.py and environment.py, which keep the authors.
"""

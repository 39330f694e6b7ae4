"""Models of Hugging Face's transformers, from a local folder to a local folder (extra: hf).

Nothing else in harness knows this room, and transformers is imported when it is first used: a task
(`launch/tasks/hf.py`) hands parts of it to a `Task`.

    generate.py    text from a model in training, by all ranks together
    packed.py      whether a model keeps packed documents apart, checked before step 1
    export.py      folders that from_pretrained loads
    weights.py     the weights of a folder, under the names of a model
    samples.py     rows, tokenized: texts, prompts with completions, chats
    rows.py        rows of text files, JSONL, Parquet and saved data sets
    models.py      the config of a folder, and the model that it describes
    library.py     transformers, imported late
"""

"""Records of files that are not trusted: JSON, the forms of fields, our own documents, tokenizer files."""

//! Messages and images in, token ids and pixel values out: tokenizer, chat form, image processor.

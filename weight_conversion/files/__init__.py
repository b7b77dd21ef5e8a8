"""Files of tensors, and the bytes in them: no names of models here."""

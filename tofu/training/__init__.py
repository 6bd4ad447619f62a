"""What finetune.py and forget.py share."""

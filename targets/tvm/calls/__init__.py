"""Units of work, written as kernel calls over placed memory."""

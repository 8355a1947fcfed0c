"""Any backbone, any pyramid, any detection module."""

"""What Shampoo and SOAP cost: updates beside Meta's, train steps beside AdamW's, compiling."""

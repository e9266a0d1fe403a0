/*
 * The firmware's beginning: from the reset vector, in 16-bit mode, to main() in 32-bit mode with flat segments and no
 * paging. All of it lies in the last 64 KiB below 4 GiB. It must not write to memory before main() does.
 */

        .section .text, "ax"
        .code16
        .globl  start16
start16:
        cli
        addr32 lgdtl %cs:descriptor_table_register - 0xffff0000
        movl    $0x11, %eax             /* protected mode; no cache bits */
        movl    %eax, %cr0
        ljmpl   $8, $start32

        .code32
start32:
        movl    $16, %eax
        movl    %eax, %ds
        movl    %eax, %es
        movl    %eax, %ss
        movl    $stack_end, %esp
        call    main
0:      hlt
        jmp     0b

        .balign 8
descriptor_table:
        .quad   0
        .quad   0x00cf9b000000ffff      /* code, 4 GiB */
        .quad   0x00cf93000000ffff      /* data, 4 GiB */
descriptor_table_end:
descriptor_table_register:
        .word   descriptor_table_end - descriptor_table - 1
        .long   descriptor_table

        .section .reset, "ax"
        .code16
        jmp     start16

        .section .note.GNU-stack, "", @progbits
